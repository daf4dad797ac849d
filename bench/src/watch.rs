//! Watches a guest from outside through a move: its consoles at both ends, stamped by one clock.
//!
//! Invariant: a verdict is what `bench/guest/verdict` says of everything that the guest ever wrote
//! on either console, and includes a full proof that was asked for and answered after the move.
//!
//! The stamping is `bench/guest/heartbeat-log`'s, the judging `bench/guest/verdict`'s; this file
//! only starts them and waits for lines. Guests write one JSON object a line and obey single
//! letters: `v` full proof and verdict, `g` forget the longest gap, `o` power off.

use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guest::bench_folder;
use crate::interrupt;
use crate::netns::Side;

/// How long a guest may take to boot; Debian under TCG on a busy machine is slow.
const READY_WAIT: Duration = Duration::from_secs(900);
/// How long a full proof of memory and disks may take.
const VERDICT_WAIT: Duration = Duration::from_secs(900);
/// How long a guest may take to answer a letter.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// How long the log's keeper may take to end.
const END_WAIT: Duration = Duration::from_secs(10);
/// How often the log is looked at; its stamps do not depend on it.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
/// The log's name in the watch's folder.
const LOG: &str = "heartbeat.log";

/// What is said of a guest after a move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether heart, memory, disks and services are as they must be.
    pub ok: bool,
    /// Everything that went wrong.
    pub why: Vec<String>,
    /// From the last heartbeat at the source to the first at the target, by the host's clock. The
    /// downtime as it is seen from outside, to a heartbeat (20 ms) at either end.
    pub gap_ms: Option<f64>,
    /// The longest gap that the guest's own clock shows; that clock may stop with the guest.
    pub guest_gap_ms: Option<f64>,
    /// The verdict as it was printed.
    pub full: Value,
}

/// The consoles of one guest at both ends. Stops watching when dropped.
#[derive(Debug)]
pub struct Watch {
    keeper: Child,
    log: PathBuf,
    reader: BufReader<std::fs::File>,
    line: String,
}

impl Watch {
    /// Starts to keep what comes from the consoles' sockets (or files), which may appear later.
    ///
    /// # Errors
    ///
    /// When the log's keeper cannot be started.
    pub fn start(folder: &Path, consoles: &[(Side, PathBuf)]) -> Result<Self> {
        let log = folder.join(LOG);
        std::fs::File::create(&log).with_context(|| format!("while creating {}", log.display()))?;
        let script = bench_folder().join("guest/heartbeat-log");
        let mut command = Command::new(&script);
        command.arg(&log).stdin(Stdio::piped());
        for (side, path) in consoles {
            command.arg(format!("{}={}", side.letter(), path.display()));
        }
        let keeper =
            command.spawn().with_context(|| format!("while starting {}", script.display()))?;
        let reader = BufReader::new(std::fs::File::open(&log)?);
        Ok(Self { keeper, log, reader, line: String::new() })
    }

    /// Waits until the guest at `side` and its load are up.
    ///
    /// # Errors
    ///
    /// When it takes too long.
    pub fn wait_ready(&mut self, side: Side) -> Result<()> {
        self.wait(side, "ready", READY_WAIT, |line| line["ev"] == "ready")
    }

    /// Waits for a heartbeat from `side`, from now on: what was said before is passed over.
    ///
    /// # Errors
    ///
    /// When none comes: the guest does not run there.
    pub fn wait_alive(&mut self, side: Side) -> Result<()> {
        self.reader.seek(SeekFrom::End(0))?;
        self.line.clear();
        self.wait(side, "a heartbeat", ANSWER_WAIT, |line| line.get("hb").is_some())
    }

    /// Waits until the guest at `side` is seen to write its memory and its disks, from now on.
    ///
    /// # Errors
    ///
    /// When it does not: it hangs, or was told to write nothing.
    pub fn wait_working(&mut self, side: Side) -> Result<()> {
        let writes = |line: &Value| Some((line["mem_writes"].as_u64()?, line["blocks"].as_u64()?));
        self.reader.seek(SeekFrom::End(0))?;
        self.line.clear();
        let first = std::cell::Cell::new(None);
        self.wait(side, "that it writes", ANSWER_WAIT, |line| match (first.get(), writes(line)) {
            (Some((memory, blocks)), Some(now)) => now.0 > memory && now.1 > blocks,
            (None, now) => {
                first.set(now);
                false
            }
            _ => false,
        })
    }

    /// Starts the guest's own measurement of its longest gap anew.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn forget_gap(&mut self, side: Side) -> Result<()> {
        self.send(side, "g")?;
        self.wait(side, "the answer to g", ANSWER_WAIT, |line| {
            line["ev"] == "done" && line["command"] == "g"
        })
    }

    /// Asks for a full proof of memory, disks and services and waits until it was given. What it
    /// says is judged by [`end`](Self::end).
    ///
    /// # Errors
    ///
    /// When none comes: the guest hangs, or is gone.
    pub fn prove(&mut self, side: Side) -> Result<()> {
        self.send(side, "v")?;
        self.wait(side, "a verdict", VERDICT_WAIT, |line| line["ev"] == "verdict")
    }

    /// Tells the guest to power itself off; returns at once.
    ///
    /// # Errors
    ///
    /// When nobody passes commands on any more.
    pub fn power_off(&mut self, side: Side) -> Result<()> {
        self.send(side, "o")
    }

    /// Stops watching and judges all that was seen. `images` are checked as well: only after the
    /// guest powered off in order.
    ///
    /// # Errors
    ///
    /// When the judge itself fails; a bad verdict is no error.
    pub fn end(mut self, at: Side, images: &[&Path]) -> Result<Verdict> {
        self.stop();
        let script = bench_folder().join("guest/verdict");
        let mut command = Command::new(&script);
        command.args(["--at", at.letter()]);
        for image in images {
            command.arg("--fsck").arg(image);
        }
        let output = command
            .arg(&self.log)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("while running {}", script.display()))?;
        // Exit code 1 is a bad verdict; then it is on standard output all the same.
        let full: Value = serde_json::from_slice(&output.stdout).with_context(|| {
            format!("{} printed no verdict ({})", script.display(), output.status)
        })?;
        let why = full["why"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Verdict {
            ok: full["ok"] == true,
            why: why.iter().filter_map(|why| why.as_str().map(str::to_owned)).collect(),
            gap_ms: full["moves"].as_array().and_then(|moves| moves.last()?["gap_ms"].as_f64()),
            guest_gap_ms: full["guest_gap_max_ms"].as_f64(),
            full,
        })
    }

    fn send(&mut self, side: Side, letter: &str) -> Result<()> {
        let stdin = self.keeper.stdin.as_mut().context("the log's keeper takes no commands")?;
        writeln!(stdin, "{} {letter}", side.letter())
            .and_then(|()| stdin.flush())
            .context("while passing a command to the guest: the log's keeper is gone")
    }

    /// Reads on until a line of `side` is wanted. Lines before it are passed over, so that a wait
    /// after a command never sees an answer to an earlier one.
    fn wait(
        &mut self,
        side: Side,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            self.reader.read_line(&mut self.line)?;
            if self.line.ends_with('\n') {
                let line = std::mem::take(&mut self.line);
                let mut parts = line.splitn(3, ' ').skip(1);
                let is_from = parts.next() == Some(side.letter());
                let text = parts.next().unwrap_or_default();
                // Kernel and boot messages are lines, too, but no JSON.
                let json = text.find('{').and_then(|at| serde_json::from_str(&text[at..]).ok());
                if is_from && json.as_ref().is_some_and(&wanted) {
                    return Ok(());
                }
                continue;
            }
            ensure!(
                Instant::now() < deadline,
                "the guest at {} did not say {what} within {timeout:?}: see {}",
                side.letter(),
                self.log.display()
            );
            interrupt::sleep(LOOK_PERIOD)?;
        }
    }

    fn stop(&mut self) {
        if matches!(self.keeper.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(pid) = i32::try_from(self.keeper.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + END_WAIT;
        while Instant::now() < deadline && !matches!(self.keeper.try_wait(), Ok(Some(_))) {
            std::thread::sleep(LOOK_PERIOD);
        }
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}
