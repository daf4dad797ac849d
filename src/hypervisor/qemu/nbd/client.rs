//! A connection to one NBD export, shared by any number of tasks.
//!
//! Two tasks own the socket: one writes requests in the order of their coming, one reads replies and
//! wakes whoever asked, matched by cookie. Invariant: a request keeps its place among the
//! [`REQUESTS_MAX`] in flight until its reply came, even if its caller went away, so a cancelled
//! future can neither tear the stream nor let its reply be taken for another's.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::codec::{
    self, CodecError, Command, EXPORT_FLUSH, EXPORT_READ_ONLY, EXPORT_TRIM, EXPORT_WRITE_ZEROES,
    ExportInfo,
};
use super::handshake::Handshake;
use super::reply::{ReadReply, Status};
use super::tasks::{Answer, Content, Pending, Request, State, read_replies, write_requests};
use super::{NbdAddress, NbdError};

/// Requests in flight on one connection: QEMU works on no more at a time.
pub const REQUESTS_MAX: usize = 16;
/// Most bytes of one [`NbdClient::read`] or [`NbdClient::write`].
pub const READ_BYTES_MAX: u32 = 4 << 20;
/// Longest wait for a connection and its handshake.
const HANDSHAKE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Longest wait for a reply: storage that hangs longer than this is reported.
const REPLY_WAIT_MAX: Duration = Duration::from_secs(120);
/// Longest wait for a server to close after the good-bye.
const GOODBYE_WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a greeting when it is only asked whether a server speaks NBD.
const GREETING_WAIT_MAX: Duration = Duration::from_secs(2);
/// Longest stretch in one request without data (block status, zeroes, trim): lengths are 32 bits.
const STRETCH_BYTES_MAX: u64 = 1 << 30;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to one export; clones share it. It ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct NbdClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    export: String,
    info: ExportInfo,
    /// Ids of the metadata contexts in the order in which they were asked for.
    contexts: Vec<u32>,
    requests: mpsc::Sender<Request>,
    places: Arc<Semaphore>,
    state: Arc<State>,
    ended: watch::Receiver<bool>,
}

/// Whether a server at `path` opens with NBD's greeting. It is left again at once.
pub async fn server_greets(path: &Path) -> bool {
    address_greets(&NbdAddress::Unix(path.to_owned())).await
}

/// As [`server_greets`], at any address.
pub(in crate::hypervisor::qemu) async fn address_greets(address: &NbdAddress) -> bool {
    let greeting = async {
        let mut stream = open(address).await.ok()?;
        let mut bytes = [0; codec::GREETING_BYTES];
        stream.read_exact(&mut bytes).await.ok()?;
        let flags = codec::answer_greeting(&bytes).ok()?;
        // Leaving without a word would put a complaint into QEMU's log. What it answers, and
        // whether, is of no interest.
        let abort = codec::encode_option(codec::HandshakeOption::Abort, &[]);
        let _ = stream.write_all(&[&flags[..], &abort].concat()).await;
        let _ = stream.read(&mut bytes).await;
        Some(())
    };
    matches!(tokio::time::timeout(GREETING_WAIT_MAX, greeting).await, Ok(Some(())))
}

async fn open(address: &NbdAddress) -> std::io::Result<Box<dyn Stream>> {
    Ok(match address {
        NbdAddress::Unix(path) => Box::new(UnixStream::connect(path).await?),
        NbdAddress::Abstract(name) => {
            use std::os::linux::net::SocketAddrExt;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
            stream.set_nonblocking(true)?;
            Box::new(UnixStream::from_std(stream)?)
        }
        NbdAddress::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

impl NbdClient {
    /// Connects to `export`, with the metadata contexts that [`status`](Self::status) is to tell.
    pub async fn connect(
        address: &NbdAddress,
        export: &str,
        contexts: &[&str],
    ) -> Result<Self, NbdError> {
        let connecting = tokio::time::timeout(HANDSHAKE_WAIT_MAX, open(address));
        let stream = match connecting.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => {
                return Err(NbdError::Connect {
                    address: address.to_string(),
                    source: source.into(),
                });
            }
            Err(_) => return Err(silent(export, HANDSHAKE_WAIT_MAX)),
        };
        Self::over(stream, export, contexts).await
    }

    /// As [`connect`](Self::connect), over a connection that is there.
    pub async fn over<S>(mut stream: S, export: &str, contexts: &[&str]) -> Result<Self, NbdError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let handshake = Handshake::new(&mut stream, export).run(contexts);
        let agreed = tokio::time::timeout(HANDSHAKE_WAIT_MAX, handshake)
            .await
            .map_err(|_| silent(export, HANDSHAKE_WAIT_MAX))??;
        let (reader, writer) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(REQUESTS_MAX + 1);
        let (ending, ended) = watch::channel(false);
        let state = Arc::new(State::new(export));
        tokio::spawn(write_requests(writer, queue, Arc::clone(&state)));
        tokio::spawn(read_replies(reader, Arc::clone(&state), ending));
        let shared = Shared {
            export: export.to_owned(),
            info: agreed.info,
            contexts: agreed.contexts,
            requests,
            places: Arc::new(Semaphore::new(REQUESTS_MAX)),
            state,
            ended,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Size, flags and limits of the export.
    pub fn info(&self) -> &ExportInfo {
        &self.shared.info
    }

    /// Reads `len` bytes (1 to [`READ_BYTES_MAX`]) at `offset`.
    pub async fn read(&self, offset: u64, len: u32) -> Result<Bytes, NbdError> {
        self.check(Command::Read, offset, u64::from(len), u64::from(READ_BYTES_MAX))?;
        // An export on a disk with large sectors takes whole sectors only: read around.
        let block = u64::from(self.shared.info.block_bytes_min);
        let start = offset - offset % block;
        let end = (offset + u64::from(len)).next_multiple_of(block).min(self.shared.info.bytes);
        let payload_max = u64::from(self.shared.info.payload_bytes_max);
        if end - start > payload_max {
            return Err(self.illegal(Command::Read, offset, u64::from(len), "too long"));
        }
        let whole = u32::try_from(end - start).expect("at most the server's 32-bit maximum");
        let content = Content::Read(ReadReply::new(start, whole));
        match self.request(Command::Read, 0, start, whole, Bytes::new(), content).await? {
            Answer::Read(bytes) => {
                let skip = usize::try_from(offset - start).expect("less than one block");
                Ok(bytes.slice(skip..skip + len as usize))
            }
            _ => Err(self.stray(Command::Read)),
        }
    }

    /// Writes `data` (1 to [`READ_BYTES_MAX`] bytes) at `offset`.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        let max = READ_BYTES_MAX.min(self.shared.info.payload_bytes_max);
        self.check_change(Command::Write, offset, data.len() as u64, u64::from(max))?;
        let len = u32::try_from(data.len()).expect("checked against a 32-bit maximum");
        self.request(Command::Write, 0, offset, len, data, Content::Nothing).await.map(drop)
    }

    /// Makes a stretch of any length read as zeros; its space is given up unless `keep_space`.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        keep_space: bool,
    ) -> Result<(), NbdError> {
        if self.shared.info.flags & EXPORT_WRITE_ZEROES == 0 {
            return Err(self.illegal(Command::WriteZeroes, offset, len, "it cannot write zeroes"));
        }
        let flags = if keep_space { codec::REQUEST_NO_HOLE } else { 0 };
        self.change_stretch(Command::WriteZeroes, flags, offset, len).await
    }

    /// Gives a stretch of any length up; what it reads as afterwards is undefined.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        if self.shared.info.flags & EXPORT_TRIM == 0 {
            return Err(self.illegal(Command::Trim, offset, len, "it cannot trim"));
        }
        self.change_stretch(Command::Trim, 0, offset, len).await
    }

    async fn change_stretch(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
    ) -> Result<(), NbdError> {
        self.check_change(command, offset, len, u64::MAX)?;
        let mut at = offset;
        while at < offset + len {
            let step = (offset + len - at).min(STRETCH_BYTES_MAX);
            let step_len = u32::try_from(step).expect("at most STRETCH_BYTES_MAX");
            self.request(command, flags, at, step_len, Bytes::new(), Content::Nothing).await?;
            at += step;
        }
        Ok(())
    }

    /// Returns once every write that was answered before is durable.
    pub async fn flush(&self) -> Result<(), NbdError> {
        if self.shared.info.flags & EXPORT_FLUSH == 0 {
            return Err(self.illegal(Command::Flush, 0, 0, "it cannot flush"));
        }
        self.request(Command::Flush, 0, 0, 0, Bytes::new(), Content::Nothing).await.map(drop)
    }

    /// Hands every stretch of `offset..offset + len` as `context` (an index into the contexts asked
    /// for) sees it to `each`, in order and without gaps; neighbours may have equal flags.
    pub async fn status(
        &self,
        context: usize,
        offset: u64,
        len: u64,
        mut each: impl FnMut(Status) + Send,
    ) -> Result<(), NbdError> {
        self.check(Command::BlockStatus, offset, len, u64::MAX)?;
        if context >= self.shared.contexts.len() {
            return Err(self.illegal(Command::BlockStatus, offset, len, "no such context"));
        }
        let block = u64::from(self.shared.info.block_bytes_min);
        let (first, end) = (offset, offset + len);
        let mut at = offset - offset % block;
        while at < end {
            let stop = (at + STRETCH_BYTES_MAX).min(end.next_multiple_of(block));
            let step = u32::try_from(stop.min(self.shared.info.bytes) - at)
                .expect("at most STRETCH_BYTES_MAX");
            let content = Content::Status {
                wanted: self.shared.contexts.clone(),
                found: HashMap::with_capacity(self.shared.contexts.len()),
            };
            let answer =
                self.request(Command::BlockStatus, 0, at, step, Bytes::new(), content).await?;
            let Answer::Status(mut contexts) = answer else {
                return Err(self.stray(Command::BlockStatus));
            };
            // Never empty: the reader refuses answers that do not move on.
            for status in contexts.swap_remove(context) {
                at = status.offset + status.len;
                let cut = status.offset.max(first)..at.min(end);
                if !cut.is_empty() {
                    each(Status {
                        offset: cut.start,
                        len: cut.end - cut.start,
                        flags: status.flags,
                    });
                }
            }
        }
        Ok(())
    }

    /// Says good-bye and waits until the server closed the connection. Other clones' requests fail.
    pub async fn disconnect(self) {
        let head = codec::encode_request(Command::Disconnect, 0, 0, 0, 0);
        let mut ended = self.shared.ended.clone();
        let leaving = async {
            if self.shared.requests.send(Request { head, payload: Bytes::new() }).await.is_ok() {
                // An error means that the reader is gone, which is what is waited for.
                let _ = ended.wait_for(|ended| *ended).await;
            }
        };
        if tokio::time::timeout(GOODBYE_WAIT_MAX, leaving).await.is_err() {
            tracing::debug!(export = self.shared.export, "NBD server did not close after good-bye");
        }
    }

    async fn request(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u32,
        payload: Bytes,
        content: Content,
    ) -> Result<Answer, NbdError> {
        let exchange = async {
            let place = Arc::clone(&self.shared.places)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            let (done, answer) = oneshot::channel();
            let pending = Pending {
                command,
                offset,
                len: u64::from(len),
                content,
                failure: None,
                done,
                _place: place,
            };
            let cookie = self.shared.state.register(pending)?;
            let head = codec::encode_request(command, flags, cookie, offset, len);
            // The queue has room for every place and a good-bye, so it is never full. A future
            // dropped here would leave a registered request unsent: no await between the two.
            if self.shared.requests.try_send(Request { head, payload }).is_err() {
                self.shared.state.fail(self.shared.state.closed());
            }
            answer.await.unwrap_or_else(|_| Err(self.shared.state.closed()))
        };
        tokio::time::timeout(REPLY_WAIT_MAX, exchange)
            .await
            .unwrap_or_else(|_| Err(silent(&self.shared.export, REPLY_WAIT_MAX)))
    }

    fn check(&self, command: Command, offset: u64, len: u64, max: u64) -> Result<(), NbdError> {
        let end = offset.checked_add(len);
        if len == 0 || len > max {
            return Err(self.illegal(command, offset, len, "its length is not allowed"));
        }
        if end.is_none_or(|end| end > self.shared.info.bytes) {
            return Err(self.illegal(command, offset, len, "it ends beyond the export"));
        }
        Ok(())
    }

    fn check_change(
        &self,
        command: Command,
        offset: u64,
        len: u64,
        max: u64,
    ) -> Result<(), NbdError> {
        self.check(command, offset, len, max)?;
        if self.shared.info.flags & EXPORT_READ_ONLY != 0 {
            return Err(self.illegal(command, offset, len, "it is read-only"));
        }
        let block = u64::from(self.shared.info.block_bytes_min);
        let aligned_end = (offset + len).is_multiple_of(block);
        if !offset.is_multiple_of(block) || !(aligned_end || offset + len == self.shared.info.bytes)
        {
            return Err(self.illegal(command, offset, len, "it is not aligned to its blocks"));
        }
        Ok(())
    }

    fn illegal(&self, command: Command, offset: u64, len: u64, reason: &'static str) -> NbdError {
        NbdError::Illegal { export: self.shared.export.clone(), command, offset, len, reason }
    }

    fn stray(&self, command: Command) -> NbdError {
        let source = CodecError::Stray { place: "request", found: command as u64 };
        NbdError::Protocol { export: self.shared.export.clone(), source }
    }
}

fn silent(export: &str, wait: Duration) -> NbdError {
    NbdError::Silent { export: export.to_owned(), seconds: wait.as_secs() }
}
