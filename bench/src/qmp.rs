//! A small blocking QMP client for rivals and tests. The product has its own; a rival must not share code
//! with what it is compared to.
//!
//! Invariant: no event is lost between two commands: what arrives while something else is awaited
//! is kept in order, up to [`EVENTS_MAX`].
//!
//! Format: one JSON object a line, QEMU's docs/interop/qmp-spec.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long QEMU may take to answer a command. It answers late while it holds its big lock.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// How long a starting QEMU may take to open its socket.
const CONNECT_WAIT: Duration = Duration::from_secs(30);
/// Longest line: `query-qmp-schema` is the longest answer known, about 300 KiB.
const LINE_BYTES_MAX: u64 = 4 << 20;
/// Events kept for a later wait.
const EVENTS_MAX: usize = 10_000;

/// Something that QEMU tells unasked.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data, `null` if it has none.
    pub data: Value,
    /// When, in seconds of the host's clock since 1970.
    pub time_s: f64,
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    reader: BufReader<UnixStream>,
    /// What a timed-out read got of a line.
    partial: Vec<u8>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects to the monitor of a QEMU that is starting.
    ///
    /// # Errors
    ///
    /// When nobody answers there in time.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + CONNECT_WAIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("while connecting to {}", path.display()));
                }
            }
        };
        let mut qmp = Self {
            path: path.to_owned(),
            reader: BufReader::new(stream),
            partial: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.line(Instant::now() + CONNECT_WAIT)?.context("no greeting came")?;
        ensure!(greeting.get("QMP").is_some(), "{}: {greeting} is no greeting", path.display());
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    ///
    /// QEMU's own words, or that it is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = serde_json::to_vec(&json!({"execute": command, "arguments": arguments}))?;
        line.push(b'\n');
        self.reader
            .get_ref()
            .write_all(&line)
            .with_context(|| format!("while sending {command} to {}", self.path.display()))?;
        let deadline = Instant::now() + ANSWER_WAIT;
        loop {
            let mut answer = self
                .line(deadline)?
                .with_context(|| format!("{}: no answer to {command}", self.path.display()))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!(
                    "{command} was refused: {}",
                    error["desc"].as_str().unwrap_or("without a word")
                );
            }
            self.keep(&answer);
        }
    }

    /// Waits for the first event, among those kept and those to come, that `choose` wants.
    ///
    /// # Errors
    ///
    /// When none comes in time (`what` says in words what was awaited), or QEMU is gone.
    pub fn wait<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        choose: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T> {
        self.wait_a_while(timeout, choose)?.with_context(|| {
            format!("{}: {what} did not come within {timeout:?}", self.path.display())
        })
    }

    /// As [`wait`](Self::wait), but `None` when nothing came in time.
    ///
    /// # Errors
    ///
    /// When QEMU is gone.
    pub fn wait_a_while<T>(
        &mut self,
        time: Duration,
        mut choose: impl FnMut(&Event) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + time;
        let mut seen = 0;
        loop {
            while let Some(event) = self.events.get(seen) {
                if let Some(chosen) = choose(event) {
                    self.events.remove(seen);
                    return Ok(Some(chosen));
                }
                seen += 1;
            }
            let Some(message) = self.line(deadline)? else { return Ok(None) };
            self.keep(&message);
        }
    }

    fn keep(&mut self, message: &Value) {
        let Some(name) = message.get("event").and_then(Value::as_str) else { return };
        let part = |key| message["timestamp"][key].as_f64().unwrap_or(0.0);
        let time_s = part("seconds") + part("microseconds") * 1e-6;
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        let data = message["data"].clone();
        self.events.push_back(Event { name: name.to_owned(), data, time_s });
    }

    /// The next line, or `None` when the deadline passed.
    fn line(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let limit = LINE_BYTES_MAX.saturating_sub(self.partial.len() as u64);
            ensure!(limit > 0, "{}: a line without an end", self.path.display());
            match (&mut self.reader).take(limit).read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("the QEMU at {} is gone", self.path.display()),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(serde_json::from_slice(&line)?));
                }
                Ok(_) => {}
                Err(error) => match error.kind() {
                    std::io::ErrorKind::WouldBlock
                    | std::io::ErrorKind::TimedOut
                    | std::io::ErrorKind::Interrupted => {}
                    _ => {
                        return Err(error).with_context(|| {
                            format!("while reading from {}", self.path.display())
                        });
                    }
                },
            }
        }
    }
}
