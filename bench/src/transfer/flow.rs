//! A flow, as the lab sees it: a process at each end, started, asked and ended.
//!
//! Invariant: both processes end with this value, whatever happened.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::caps::Caps;
use super::{Answer, Bound, Engine, Order, Received, Sent, Tool, longhaul, quic, rsync};
use crate::interrupt;
use crate::netns::Side;
use crate::profile::Profile;
use crate::wan::{self, Wan};

/// How long an end may take to come up.
const START_WAIT: Duration = Duration::from_secs(30);
/// How long a receiver may take to notice by itself that its sender is done, beside round trips.
const NOTICE_WAIT: Duration = Duration::from_secs(2);
/// How long an end may take to answer once it was told to stop.
const STOP_WAIT: Duration = Duration::from_secs(20);
/// How often a wait looks for a signal.
const LOOK_PERIOD: Duration = Duration::from_millis(20);

/// What is asked of a flow.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) tool: Tool,
    pub(super) bound: Bound,
    /// Whether what was offered is brought to its end.
    pub(super) is_drained: bool,
    pub(super) caps: Caps,
    /// After this long it is told to stop.
    pub(super) give_up: Duration,
}

/// A flow whose receiver listens.
pub(super) struct Flow {
    order: Order,
    rtt: Duration,
    give_up: Duration,
    receiver: End,
}

/// Makes what a flow needs in a folder of its own, before there is a WAN.
pub(super) fn prepare(folder: PathBuf, asked: &Asked, profile: &Profile) -> Result<Order> {
    std::fs::create_dir(&folder).with_context(|| format!("while creating {}", folder.display()))?;
    match asked.tool.engine() {
        Engine::Longhaul => longhaul::prepare(&folder)?,
        Engine::Quinn(_) => quic::prepare(&folder)?,
        Engine::Tcp { .. } => {}
        Engine::Rsync => rsync::prepare(&folder, asked.bound, profile)?,
    }
    Ok(Order {
        side: Side::B,
        tool: asked.tool,
        bound: asked.bound,
        is_drained: asked.is_drained,
        caps: asked.caps.clone(),
        port: 0,
        folder,
        mtu: profile.mtu,
    })
}

impl Flow {
    /// Starts the receiver and waits until it listens.
    pub(super) fn listen(wan: &Wan, mut order: Order, give_up: Duration) -> Result<Self> {
        let mut receiver = End::start(wan, &order)?;
        match receiver.answer(START_WAIT)? {
            Some(Answer::Ready { port }) => order.port = port,
            other => bail!("the receiver of {} did not listen: {other:?}", order.tool.name()),
        }
        order.side = Side::A;
        Ok(Self { order, rtt: wan.spec().profile.rtt(), give_up, receiver })
    }

    /// Sends, and says what was sent and what arrived.
    pub(super) fn transfer(mut self, wan: &Wan) -> Result<(Sent, Received)> {
        let mut sender = End::start(wan, &self.order)?;
        let mut answer = sender.answer(self.give_up)?;
        if answer.is_none() {
            sender.stop();
            answer = sender.answer(STOP_WAIT)?;
        }
        let Some(Answer::Sent(sent)) = answer else {
            bail!("the sender of {} said {answer:?}", self.order.tool.name());
        };
        let mut answer = None;
        if self.order.tool.engine() != Engine::Rsync {
            answer = self.receiver.answer(NOTICE_WAIT + 8 * self.rtt)?;
        }
        if answer.is_none() {
            self.receiver.stop();
            answer = self.receiver.answer(STOP_WAIT)?;
        }
        match answer {
            Some(Answer::Received(received)) => Ok((sent, received)),
            other => bail!("the receiver of {} said {other:?}", self.order.tool.name()),
        }
    }
}

/// A process at one end of a WAN that was given an order.
struct End {
    child: Child,
    /// While it is open the process goes on.
    leash: Option<ChildStdin>,
    answers: mpsc::Receiver<String>,
}

impl End {
    fn start(wan: &Wan, order: &Order) -> Result<Self> {
        let mut child = wan
            .command(order.side, wan::lab_binary()?)
            .args(["link", "end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("while starting an end of a flow")?;
        let (leash, output) = (child.stdin.take(), child.stdout.take());
        let (say, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = output.into_iter().flat_map(|output| BufReader::new(output).lines());
            for line in lines.map_while(Result::ok) {
                let _ = say.send(line);
            }
        });
        let mut end = Self { child, leash, answers };
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        if let Some(leash) = &mut end.leash {
            leash.write_all(&line).context("while giving an order to an end of a flow")?;
        }
        Ok(end)
    }

    /// Its next answer; `None` if there is none in `time`.
    fn answer(&mut self, time: Duration) -> Result<Option<Answer>> {
        let deadline = Instant::now() + time;
        loop {
            interrupt::check()?;
            match self.answers.recv_timeout(LOOK_PERIOD) {
                Ok(line) => {
                    let answer = serde_json::from_str(&line)
                        .with_context(|| format!("an end of a flow said {line:?}"))?;
                    if let Answer::Failed { why } = answer {
                        bail!("{why}");
                    }
                    return Ok(Some(answer));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("an end of a flow ended without a word: {}", self.child.wait()?);
                }
            }
        }
    }

    /// Tells it to come to its end.
    fn stop(&mut self) {
        self.leash = None;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
