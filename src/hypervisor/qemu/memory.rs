//! The two ends of QEMU's local migration sockets, and who drives QEMU meanwhile.
//!
//! Invariant: a stream counts as ended only if its own end mark came by. A socket that closes earlier
//! (a cancelled migration, a QEMU that died) is an error at both ends, on every further call too.
//!
//! [`SourceMemory`] and [`TargetMemory`] say over QMP what QEMU shall do; [`QemuMemorySource`] and
//! [`QemuMemorySink`] carry the bytes, with [`ramstream`](super::ramstream) in between.

mod again;
mod source;
mod status;
mod target;

use std::io;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

pub use source::SourceMemory;
pub(super) use source::is_given_back;
pub use target::TargetMemory;

use super::ramstream::{Parser, StreamCut, WriteError, Writer};
use crate::hypervisor::{HypervisorError, MemoryEvent, MemorySink, MemorySource};

/// Bytes asked of QEMU in one read. It writes up to 64 pages at once and its socket holds about as
/// many, so more would not be filled.
const READ_BYTES: usize = 256 << 10;

/// Bytes of stream that are made before they are written to QEMU, apart from one event's.
const WRITE_BYTES: usize = 1 << 20;

/// How long QEMU may send nothing while it is read. It is silent in the pause before the switchover
/// and while it is blocked by its disks; for longer than this it hangs.
pub const SILENCE_MAX: Duration = Duration::from_secs(600);

/// How long QEMU may take to read what fits into its socket. It loads pages at the speed of memory.
pub const STALL_MAX: Duration = Duration::from_secs(120);

/// Longest path of a unix socket, without the zero byte at its end.
const SOCKET_PATH_MAX: usize = 107;

/// Memory as it comes out of a QEMU that runs `migrate`.
#[derive(Debug)]
pub struct QemuMemorySource {
    vm: String,
    stream: UnixStream,
    buffer: Vec<u8>,
    bytes: u64,
    state: Reading,
    /// For a stream that is replaced by a second one.
    again: Option<again::Listener>,
}

#[derive(Debug)]
enum Reading {
    Open(Box<Parser>),
    Ended,
    Cut(StreamCut),
}

impl QemuMemorySource {
    /// Reads from a socket that QEMU connected to; `vm` names the VM in errors.
    pub fn new(vm: &str, stream: UnixStream, parser: Parser) -> Self {
        let state = Reading::Open(Box::new(parser));
        let buffer = vec![0; READ_BYTES];
        Self { vm: vm.to_owned(), stream, buffer, bytes: 0, state, again: None }
    }

    /// Reads this stream until it is replaced by a second one.
    fn until_told_again(mut self, listener: again::Listener) -> Self {
        self.again = Some(listener);
        self
    }

    /// Reads some bytes, 0 at the end; of the second stream once it is announced.
    async fn read(&mut self) -> Result<usize, HypervisorError> {
        loop {
            let again = async {
                match &mut self.again {
                    Some(again) => again.announced().await,
                    None => std::future::pending().await,
                }
            };
            let read = tokio::select! {
                // What is left of the first stream is not worth reading then.
                biased;
                () = again => Ok(0),
                read = self.stream.read(&mut self.buffer) => read,
            };
            match read {
                Ok(0) => {}
                // QEMU resets the socket when a migration is cancelled: a cut like any other.
                Err(source) if source.kind() == io::ErrorKind::ConnectionReset => {}
                Ok(len) => return Ok(len),
                Err(source) => {
                    let doing = format!("{}: reading its memory", self.vm);
                    return Err(HypervisorError::Io { doing, source });
                }
            }
            let Some(again) = &mut self.again else { return Ok(0) };
            if !again.is_announced() {
                return Ok(0);
            }
            let Some(stream) = again.successor().await else { return Ok(0) };
            again.begin_again().map_err(|reason| unexpected(&self.vm, reason))?;
            self.stream = stream;
            self.state = Reading::Open(Box::default());
        }
    }

    fn end(&mut self) -> Result<bool, HypervisorError> {
        if let Reading::Open(_) = self.state
            && let Reading::Open(parser) = std::mem::replace(&mut self.state, Reading::Ended)
            && let Err(cut) = parser.finish()
        {
            self.state = Reading::Cut(cut);
        }
        match &self.state {
            Reading::Cut(cut) => Err(unexpected(&self.vm, &cut.to_string())),
            Reading::Open(_) | Reading::Ended => Ok(false),
        }
    }
}

#[async_trait]
impl MemorySource for QemuMemorySource {
    /// May be dropped while it waits: nothing is lost.
    async fn next(&mut self, events: &mut Vec<MemoryEvent>) -> Result<bool, HypervisorError> {
        let before = events.len();
        while let Reading::Open(_) = self.state {
            let read = timeout(SILENCE_MAX, self.read()).await;
            let len = read.map_err(|_| HypervisorError::Gone {
                vm: self.vm.clone(),
                detail: format!("no memory came for {} s", SILENCE_MAX.as_secs()),
            })??;
            // Reading may have gone over to another stream, which has a parser of its own.
            let Reading::Open(parser) = &mut self.state else { break };
            if len == 0 {
                break;
            }
            self.bytes += len as u64;
            parser.push(&self.buffer[..len], events);
            if let Some(again) = &mut self.again {
                let filtered = again.filter(events, before);
                filtered.map_err(|reason| unexpected(&self.vm, reason))?;
            }
            if events.len() > before {
                for event in &events[before..] {
                    if let MemoryEvent::NotUnderstood { reason } = event {
                        tracing::warn!(vm = self.vm, reason, "memory is passed through from here");
                    }
                }
                return Ok(true);
            }
        }
        self.end()
    }

    fn bytes_read(&self) -> u64 {
        self.bytes
    }
}

/// Memory as it goes into a QEMU that runs `migrate-incoming`.
#[derive(Debug)]
pub struct QemuMemorySink {
    vm: String,
    stream: UnixStream,
    writer: Writer,
    buffer: Vec<u8>,
    /// A write was begun and did not succeed: nobody knows how much of it arrived.
    void: bool,
}

impl QemuMemorySink {
    /// Writes to a socket that QEMU listens at; `vm` names the VM in errors.
    pub fn new(vm: &str, stream: UnixStream) -> Self {
        Self {
            vm: vm.to_owned(),
            stream,
            writer: Writer::new(),
            buffer: Vec::with_capacity(WRITE_BYTES),
            void: false,
        }
    }

    fn refused(&self, error: &WriteError) -> HypervisorError {
        HypervisorError::Unexpected { vm: self.vm.clone(), detail: error.to_string() }
    }

    async fn flush(&mut self) -> Result<(), HypervisorError> {
        let written = timeout(STALL_MAX, self.stream.write_all(&self.buffer)).await;
        self.buffer.clear();
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => {
                let doing = format!("{}: handing it its memory (it may have refused it)", self.vm);
                Err(HypervisorError::Io { doing, source })
            }
            Err(_) => Err(HypervisorError::Gone {
                vm: self.vm.clone(),
                detail: format!("it took no memory for {} s", STALL_MAX.as_secs()),
            }),
        }
    }
}

#[async_trait]
impl MemorySink for QemuMemorySink {
    /// Must run to its end: after a call that failed or was dropped the stream is void.
    async fn apply(&mut self, events: Vec<MemoryEvent>) -> Result<(), HypervisorError> {
        if self.void {
            return Err(HypervisorError::Unexpected {
                vm: self.vm.clone(),
                detail: "an earlier part of its memory did not arrive: start it anew".to_owned(),
            });
        }
        self.void = true;
        let mut rest = &events[..];
        while !rest.is_empty() {
            // As many as fit, so that one call never builds the whole of a large batch at once.
            let mut bytes = 0;
            let fit = rest.iter().take_while(|event| {
                let fits = bytes < WRITE_BYTES;
                bytes += stream_bytes(event);
                fits
            });
            let (some, more) = rest.split_at(fit.count());
            let encoded = self.writer.encode(some, &mut self.buffer);
            encoded.map_err(|error| self.refused(&error))?;
            self.flush().await?;
            rest = more;
        }
        self.void = false;
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<(), HypervisorError> {
        let Self { vm, mut stream, writer, void, .. } = *self;
        if void {
            let detail = "part of its memory did not arrive: start it anew".to_owned();
            return Err(HypervisorError::Unexpected { vm, detail });
        }
        if let Err(error) = writer.finish() {
            return Err(HypervisorError::Unexpected { vm, detail: error.to_string() });
        }
        match stream.shutdown().await {
            // QEMU closes the socket by itself as soon as it has loaded everything.
            Err(source) if source.kind() != io::ErrorKind::NotConnected => {
                Err(HypervisorError::Io { doing: format!("{vm}: ending its memory"), source })
            }
            _ => Ok(()),
        }
    }
}

fn unexpected(vm: &str, detail: &str) -> HypervisorError {
    HypervisorError::Unexpected { vm: vm.to_owned(), detail: detail.to_owned() }
}

/// About what an event takes in the stream.
fn stream_bytes(event: &MemoryEvent) -> usize {
    match event {
        MemoryEvent::Page { content, .. } => content.len() + 8,
        MemoryEvent::Opaque(bytes) => bytes.len(),
        _ => 16,
    }
}

/// Refuses a path that no unix socket can have, before QEMU does it in its own words.
fn check_socket_path(vm: &str, path: &Path) -> Result<(), HypervisorError> {
    let text = path.to_str();
    if text.is_some_and(|text| text.len() <= SOCKET_PATH_MAX && path.is_absolute()) {
        return Ok(());
    }
    Err(HypervisorError::Unsupported {
        vm: vm.to_owned(),
        reason: format!(
            "{} cannot be a socket's path: it must be absolute and have at most {SOCKET_PATH_MAX} \
             bytes; choose a shorter run directory",
            path.display()
        ),
    })
}
