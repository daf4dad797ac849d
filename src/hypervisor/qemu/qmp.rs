//! A client for QEMU's machine protocol: JSON lines over a unix socket.
//!
//! Invariant: every command gets exactly one answer, its own (matched by id), an error of QEMU's, a
//! timeout, or [`HypervisorError::Gone`] once the socket closed; none waits for ever. Events reach
//! every receiver that existed before they arrived: subscribe with [`Qmp::events`], act, then wait.
//!
//! The protocol is QEMU's `docs/interop/qmp-spec`. Unknown fields, events and answers to commands
//! that were given up are ignored, so newer QEMUs work.

mod wire;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

pub use self::wire::LINE_BYTES_MAX;
use self::wire::{ErrorAnswer, Line, NoGreeting, greet, next_line};
use crate::hypervisor::HypervisorError;

/// How long a monitor may take to accept us and greet. A monitor serves one client at a time and
/// lets the next one wait, so this is also how a monitor that somebody else holds is noticed.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a command may take that only looks at or notes something. QEMU answers within
/// milliseconds, except while it holds its main lock in the device phase of a migration.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a command may take that flushes, opens or activates disk images.
pub const DISK_COMMAND_TIMEOUT: Duration = Duration::from_secs(180);

/// Commands that wait for disks before they answer.
const DISK_COMMANDS: [&str; 9] = [
    "block-dirty-bitmap-remove",
    "block-export-add",
    "block-export-del",
    "blockdev-add",
    "blockdev-del",
    "cont",
    "migrate-continue",
    "stop",
    "transaction",
];

/// Events that a slow receiver may fall behind before it misses some (and is told so).
const EVENTS_BEHIND_MAX: usize = 1024;

/// Commands in flight at once over one socket; further ones wait their turn.
const IN_FLIGHT_MAX: usize = 32;

/// Something that QEMU reports by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpEvent {
    /// QEMU's name for it, such as `STOP`.
    pub name: String,
    /// What it says; null if it has no data.
    pub data: Value,
    /// When it happened by QEMU's wall clock, in microseconds since 1970, if it said so.
    pub at_us: Option<u64>,
}

/// A connection to one QEMU's monitor. Clones share it; it closes with the last of them.
#[derive(Debug, Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    vm: String,
    version: (u32, u32, u32),
    peer_pid: Option<i32>,
    lines: mpsc::Sender<Vec<u8>>,
    turns: Semaphore,
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

/// What the reading task and the callers both touch.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open {
        next_id: u64,
        pending: HashMap<u64, oneshot::Sender<Answer>>,
        events: broadcast::Sender<QmpEvent>,
        /// When it last reported that the VM stopped.
        stopped: Option<Instant>,
    },
    /// The socket is closed, with the reason.
    Closed(String),
}

/// What became of one command.
#[derive(Debug)]
enum Answer {
    Return(Value),
    Error(ErrorAnswer),
}

impl Qmp {
    /// Connects to the monitor at `path`, reads its greeting and negotiates capabilities. `vm` names
    /// the VM in errors.
    ///
    /// # Errors
    ///
    /// `Gone` if nobody listens there or no greeting comes in time, `Io` if the socket cannot be
    /// used, `Unexpected` if whoever answers does not speak QMP.
    pub async fn connect(path: &Path, vm: &str) -> Result<Self, HypervisorError> {
        let shown = path.display();
        let stream = match timeout(GREETING_TIMEOUT, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) if is_nobody_there(e.kind()) => {
                return Err(HypervisorError::Gone {
                    vm: vm.to_owned(),
                    detail: format!("nobody listens at its monitor {shown} ({e})"),
                });
            }
            Ok(Err(source)) => {
                return Err(HypervisorError::Io {
                    doing: format!("{vm}: connecting to its monitor {shown}"),
                    source,
                });
            }
            Err(_) => {
                return Err(HypervisorError::Gone {
                    vm: vm.to_owned(),
                    detail: format!("its monitor {shown} accepts no connection"),
                });
            }
        };
        Self::over(stream, vm).await
    }

    /// Speaks over a socket that is already connected.
    async fn over(stream: UnixStream, vm: &str) -> Result<Self, HypervisorError> {
        let peer_pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let version = match timeout(GREETING_TIMEOUT, greet(&mut read)).await {
            Ok(Ok(version)) => version,
            Ok(Err(NoGreeting::Stranger)) => {
                return Err(HypervisorError::Unexpected {
                    vm: vm.to_owned(),
                    detail: "whoever listens at its monitor socket does not speak QMP: expected \
                             a line with a QMP greeting"
                        .to_owned(),
                });
            }
            Ok(Err(NoGreeting::Closed(why))) => {
                return Err(HypervisorError::Gone {
                    vm: vm.to_owned(),
                    detail: format!("its monitor closed before it greeted ({why})"),
                });
            }
            Err(_) => {
                return Err(HypervisorError::Gone {
                    vm: vm.to_owned(),
                    detail: format!(
                        "its monitor sent no greeting within {} s; a monitor serves one client at \
                         a time: give Longhaul one of its own",
                        GREETING_TIMEOUT.as_secs()
                    ),
                });
            }
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Open {
                next_id: 1,
                pending: HashMap::new(),
                events: broadcast::channel(EVENTS_BEHIND_MAX).0,
                stopped: None,
            }),
        });
        let (lines, queue) = mpsc::channel(IN_FLIGHT_MAX);
        let writer = tokio::spawn(write_lines(write, queue, Arc::clone(&shared)));
        let reader = tokio::spawn({
            let (shared, vm, writer) = (Arc::clone(&shared), vm.to_owned(), writer.abort_handle());
            async move {
                read_lines(read, &shared, &vm).await;
                // The socket closes only once both halves are gone.
                writer.abort();
            }
        });
        let qmp = Self {
            inner: Arc::new(Inner {
                vm: vm.to_owned(),
                version,
                peer_pid,
                lines,
                turns: Semaphore::new(IN_FLIGHT_MAX),
                shared,
                reader,
                writer,
            }),
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// QEMU's version by its greeting: major, minor, micro.
    pub fn version(&self) -> (u32, u32, u32) {
        self.inner.version
    }

    /// The process that listens at the other end, if the kernel knows it. A monitor that was opened
    /// by a manager and handed down belongs to the manager by this count.
    pub fn peer_pid(&self) -> Option<i32> {
        self.inner.peer_pid
    }

    /// The VM's name, as it was given to [`connect`](Self::connect).
    pub fn vm(&self) -> &str {
        &self.inner.vm
    }

    /// Whether the socket has closed. It never opens again: connect anew.
    pub fn is_closed(&self) -> bool {
        matches!(*self.inner.shared.lock(), State::Closed(_))
    }

    /// Runs one command and gives its `return` value. `arguments` must be an object (or null for
    /// none). Calls may run at the same time; dropping one gives its answer up, not the command.
    ///
    /// # Errors
    ///
    /// `Refused` with QEMU's words, or `Gone` if the socket closed or the command's time ran out
    /// ([`COMMAND_TIMEOUT`], or [`DISK_COMMAND_TIMEOUT`] for those that wait for disks).
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, HypervisorError> {
        self.execute_within(command, arguments, limit_of(command)).await
    }

    /// As [`execute`](Self::execute), with a time limit of the caller's.
    ///
    /// # Errors
    ///
    /// As [`execute`](Self::execute).
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, HypervisorError> {
        let deadline = Instant::now() + limit;
        let out_of_time = |_| self.gone(format!("{command} had no answer in {limit:?}"));

        let turn = timeout_at(deadline, self.inner.turns.acquire()).await.map_err(out_of_time)?;
        let _turn = turn.expect("the semaphore is never closed");
        let (mut pending, answer) = self.register()?;
        let mut line = if arguments.is_null() {
            json!({ "execute": command, "id": pending.id })
        } else {
            json!({ "execute": command, "arguments": arguments, "id": pending.id })
        }
        .to_string()
        .into_bytes();
        line.extend_from_slice(b"\r\n");
        tracing::trace!(vm = self.inner.vm, id = pending.id, command, "qmp command");

        let sent = timeout_at(deadline, self.inner.lines.send(line)).await;
        if sent.map_err(|_| self.gone(format!("{command} could not be sent")))?.is_err() {
            return Err(self.gone(format!("{command} could not be sent: {}", self.why_closed())));
        }
        match timeout_at(deadline, answer).await.map_err(out_of_time)? {
            Ok(answer) => {
                pending.answered = true;
                answer.into_result(&self.inner.vm, command)
            }
            Err(_) => {
                pending.answered = true;
                Err(self.gone(format!("{command} got no answer: {}", self.why_closed())))
            }
        }
    }

    /// A receiver of every event from now on. Take it before the command whose event matters.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        match &*self.inner.shared.lock() {
            State::Open { events, .. } => events.subscribe(),
            // A receiver whose sender is dropped at once: it says that the channel is closed.
            State::Closed(_) => broadcast::channel(1).1,
        }
    }

    /// When it last reported that its VM stopped, if it did on this connection.
    pub fn stopped_at(&self) -> Option<Instant> {
        match &*self.inner.shared.lock() {
            State::Open { stopped, .. } => *stopped,
            State::Closed(_) => None,
        }
    }

    /// Waits for the first event in `events` that `wanted` accepts, skipping the others.
    ///
    /// # Errors
    ///
    /// `Gone` if the socket closed or `limit` ran out, `Unexpected` if `events` fell so far behind
    /// that some were missed: look at the state itself then.
    pub async fn wait_event(
        &self,
        events: &mut broadcast::Receiver<QmpEvent>,
        mut wanted: impl FnMut(&QmpEvent) -> bool,
        limit: Duration,
    ) -> Result<QmpEvent, HypervisorError> {
        let deadline = Instant::now() + limit;
        loop {
            match timeout_at(deadline, events.recv()).await {
                Ok(Ok(event)) if wanted(&event) => return Ok(event),
                Ok(Ok(_)) => {}
                Ok(Err(broadcast::error::RecvError::Lagged(missed))) => {
                    return Err(HypervisorError::Unexpected {
                        vm: self.inner.vm.clone(),
                        detail: format!("{missed} events came faster than they were read"),
                    });
                }
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    return Err(self.gone(self.why_closed()));
                }
                Err(_) => {
                    return Err(self.gone(format!(
                        "an event that was waited for did not come in {:.1} s",
                        limit.as_secs_f64()
                    )));
                }
            }
        }
    }

    fn register(&self) -> Result<(Pending, oneshot::Receiver<Answer>), HypervisorError> {
        let (sender, receiver) = oneshot::channel();
        match &mut *self.inner.shared.lock() {
            State::Open { next_id, pending, .. } => {
                let id = *next_id;
                *next_id += 1;
                pending.insert(id, sender);
                let shared = Arc::clone(&self.inner.shared);
                Ok((Pending { id, answered: false, shared }, receiver))
            }
            State::Closed(why) => Err(self.gone(why.clone())),
        }
    }

    fn why_closed(&self) -> String {
        match &*self.inner.shared.lock() {
            State::Closed(why) => why.clone(),
            State::Open { .. } => "its monitor socket is closing".to_owned(),
        }
    }

    fn gone(&self, detail: String) -> HypervisorError {
        HypervisorError::Gone { vm: self.inner.vm.clone(), detail }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and every state it can be left in is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes for good. The first reason stays; pending commands and receivers learn of it.
    fn close(&self, why: String) {
        let mut state = self.lock();
        if matches!(*state, State::Open { .. }) {
            *state = State::Closed(why);
        }
    }
}

/// A command that waits for its answer; forgets it when it is given up.
struct Pending {
    id: u64,
    answered: bool,
    shared: Arc<Shared>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.answered
            && let State::Open { pending, .. } = &mut *self.shared.lock()
        {
            pending.remove(&self.id);
        }
    }
}

impl Answer {
    fn into_result(self, vm: &str, command: &str) -> Result<Value, HypervisorError> {
        match self {
            Self::Return(value) => Ok(value),
            Self::Error(ErrorAnswer { class, desc }) => Err(HypervisorError::Refused {
                vm: vm.to_owned(),
                command: command.to_owned(),
                detail: match class.as_str() {
                    "" | "GenericError" => desc,
                    class => format!("{desc} ({class})"),
                },
            }),
        }
    }
}

/// Whether a connect that failed so found no monitor: its socket is not there, nobody listens, or
/// who listened went away before it accepted.
fn is_nobody_there(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound};
    matches!(kind, NotFound | ConnectionRefused | ConnectionReset)
}

/// How long a command may take.
fn limit_of(command: &str) -> Duration {
    if DISK_COMMANDS.contains(&command) { DISK_COMMAND_TIMEOUT } else { COMMAND_TIMEOUT }
}

async fn write_lines(
    mut write: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
) {
    // A task of its own: a caller that is dropped half-way through must not leave half a line.
    while let Some(line) = queue.recv().await {
        if let Err(e) = write.write_all(&line).await {
            shared.close(format!("its monitor socket is closed ({e})"));
            return;
        }
    }
}

async fn read_lines(mut read: BufReader<OwnedReadHalf>, shared: &Shared, vm: &str) {
    let mut line = Vec::new();
    let why = loop {
        match next_line(&mut read, &mut line).await {
            Ok(true) => {}
            Ok(false) => break "it closed its monitor socket: the process ended".to_owned(),
            Err(e) => break format!("its monitor socket failed: {e}"),
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice(&line) {
            Ok(parsed) => dispatch(parsed, shared, vm),
            Err(e) => break format!("its monitor sent a line that is not QMP: {e}"),
        }
        // One long answer must not keep its buffer for the life of the connection.
        line.shrink_to(64 << 10);
    };
    tracing::debug!(vm, why, "monitor closed");
    shared.close(why);
}

fn dispatch(line: Line, shared: &Shared, vm: &str) {
    let mut state = shared.lock();
    let State::Open { pending, events, stopped, .. } = &mut *state else { return };
    if let Some(name) = line.event {
        tracing::debug!(vm, event = name, data = %line.data, "qmp event");
        let at_us = line.timestamp.and_then(|t| {
            let seconds = u64::try_from(t.seconds).ok()?.checked_mul(1_000_000)?;
            seconds.checked_add(u64::try_from(t.microseconds).ok()?)
        });
        if name == "STOP" {
            *stopped = Some(Instant::now());
        }
        // Nobody listening is fine.
        let _ = events.send(QmpEvent { name, data: line.data, at_us });
        return;
    }
    let waiting = line.id.as_ref().and_then(Value::as_u64).and_then(|id| pending.remove(&id));
    match (waiting, line.returned, line.error) {
        // A caller that went away meanwhile is fine.
        (Some(waiting), _, Some(error)) => drop(waiting.send(Answer::Error(error))),
        (Some(waiting), returned, None) => {
            drop(waiting.send(Answer::Return(returned.unwrap_or(Value::Null))));
        }
        (None, _, Some(error)) => {
            tracing::warn!(vm, desc = error.desc, "error for a command that nobody waits for");
        }
        (None, _, None) => tracing::debug!(vm, "answer to a command that nobody waits for"),
    }
}

#[cfg(test)]
mod tests;
