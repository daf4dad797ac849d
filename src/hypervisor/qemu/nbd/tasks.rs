//! The two tasks that own a connection, and the table of requests between them and the callers.
//!
//! Invariant: every registered request is answered exactly once: by its reply, or by the error that
//! ended the connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use super::NbdError;
use super::codec::{
    self, CodecError, Command, REPLY_HEAD_BYTES, REQUEST_BYTES, ReplyHead, STATUS_EXTENTS_MAX,
};
use super::reply::{ReadReply, Status, place_status};

const SOCKET_BUFFER_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: [u8; REQUEST_BYTES],
    pub(super) payload: Bytes,
}

#[derive(Debug)]
pub(super) struct State {
    export: String,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next_cookie: u64,
    replies: HashMap<u64, Pending>,
    dead: Option<NbdError>,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) content: Content,
    pub(super) failure: Option<(u32, String)>,
    pub(super) done: oneshot::Sender<Result<Answer, NbdError>>,
    /// Held until the reply came.
    pub(super) _place: OwnedSemaphorePermit,
}

/// What has arrived of a reply.
#[derive(Debug)]
pub(super) enum Content {
    Nothing,
    Read(ReadReply),
    Status { wanted: Vec<u32>, found: HashMap<u32, Vec<(u32, u32)>> },
}

#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Read(Bytes),
    /// Per context in the order of `Shared::contexts`.
    Status(Vec<Vec<Status>>),
}

impl State {
    pub(super) fn new(export: &str) -> Self {
        Self { export: export.to_owned(), waiting: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing under the lock panics halfway through a change.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn register(&self, pending: Pending) -> Result<u64, NbdError> {
        let mut waiting = self.lock();
        if let Some(dead) = &waiting.dead {
            return Err(dead.clone());
        }
        waiting.next_cookie += 1;
        let cookie = waiting.next_cookie;
        waiting.replies.insert(cookie, pending);
        Ok(cookie)
    }

    /// Ends the connection for everyone; the first error wins.
    pub(super) fn fail(&self, error: NbdError) {
        let mut waiting = self.lock();
        let error = waiting.dead.get_or_insert(error).clone();
        for (_, pending) in waiting.replies.drain() {
            // The caller may have gone away.
            let _ = pending.done.send(Err(error.clone()));
        }
    }

    /// Why the connection ended.
    pub(super) fn closed(&self) -> NbdError {
        let dead = self.lock().dead.clone();
        dead.unwrap_or_else(|| self.lost(std::io::ErrorKind::UnexpectedEof.into()))
    }

    fn lost(&self, source: std::io::Error) -> NbdError {
        NbdError::Lost { export: self.export.clone(), source: source.into() }
    }

    fn take(&self, cookie: u64) -> Result<Pending, CodecError> {
        let stray = CodecError::Stray { place: "cookie", found: cookie };
        self.lock().replies.remove(&cookie).ok_or(stray)
    }

    /// Puts a reply back that has more chunks to come.
    fn put(&self, cookie: u64, pending: Pending) {
        self.lock().replies.insert(cookie, pending);
    }

    fn finish(&self, pending: Pending) -> Result<(), CodecError> {
        let Pending { command, offset, len, content, failure, done, _place } = pending;
        let mut broken = None;
        let answer = match failure {
            Some((code, message)) => {
                let export = self.export.clone();
                Err(NbdError::Failed { export, command, offset, len, code, message })
            }
            None => content.finish(command, offset, len).map_err(|source| {
                broken = Some(source.clone());
                NbdError::Protocol { export: self.export.clone(), source }
            }),
        };
        // The caller may have gone away.
        let _ = done.send(answer);
        broken.map_or(Ok(()), Err)
    }
}

impl Content {
    fn finish(self, command: Command, offset: u64, len: u64) -> Result<Answer, CodecError> {
        match self {
            Self::Nothing => Ok(Answer::Done),
            Self::Read(reply) => reply.finish().map(Answer::Read),
            Self::Status { wanted, mut found } => {
                let len = u32::try_from(len).expect("requests have 32-bit lengths");
                let mut contexts = Vec::with_capacity(wanted.len());
                for id in wanted {
                    let missing = CodecError::Coverage { command, offset };
                    let extents = found.remove(&id).ok_or(missing)?;
                    contexts.push(place_status(offset, len, &extents)?);
                }
                Ok(Answer::Status(contexts))
            }
        }
    }
}

pub(super) async fn write_requests(
    writer: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Request>,
    state: Arc<State>,
) {
    let mut writer = BufWriter::with_capacity(SOCKET_BUFFER_BYTES, writer);
    while let Some(request) = queue.recv().await {
        let written = async {
            writer.write_all(&request.head).await?;
            writer.write_all(&request.payload).await?;
            if queue.is_empty() { writer.flush().await } else { Ok(()) }
        };
        if let Err(error) = written.await {
            state.fail(state.lost(error));
            return;
        }
    }
    // Every handle is gone. The server may be gone too, which is as good.
    let goodbye = codec::encode_request(Command::Disconnect, 0, 0, 0, 0);
    let _ = writer.write_all(&goodbye).await;
    let _ = writer.shutdown().await;
}

pub(super) async fn read_replies(
    reader: impl AsyncRead + Unpin,
    state: Arc<State>,
    ending: watch::Sender<bool>,
) {
    let mut reader = BufReader::with_capacity(SOCKET_BUFFER_BYTES, reader);
    let error = loop {
        match read_reply(&mut reader, &state).await {
            Ok(()) => {}
            Err(ReadError::Io(error)) => break state.lost(error),
            Err(ReadError::Codec(source)) => {
                break NbdError::Protocol { export: state.export.clone(), source };
            }
        }
    };
    state.fail(error);
    // Nobody may be waiting for it.
    let _ = ending.send(true);
}

enum ReadError {
    Io(std::io::Error),
    Codec(CodecError),
}

impl From<std::io::Error> for ReadError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<CodecError> for ReadError {
    fn from(error: CodecError) -> Self {
        Self::Codec(error)
    }
}

/// Reads one simple reply or one chunk.
async fn read_reply(reader: &mut (impl AsyncRead + Unpin), state: &State) -> Result<(), ReadError> {
    let mut head = [0; REPLY_HEAD_BYTES];
    reader.read_exact(&mut head).await?;
    match codec::decode_reply_head(&head)? {
        ReplyHead::Simple { error, cookie } => {
            let mut pending = state.take(cookie)?;
            if error != 0 {
                pending.failure = Some((error, String::new()));
            } else if !matches!(pending.content, Content::Nothing) {
                // Chunked replies were agreed on: data can come in no other form.
                let command = pending.command;
                state.put(cookie, pending);
                return Err(CodecError::Chunk { kind: 0, command }.into());
            }
            state.finish(pending)?;
        }
        ReplyHead::Chunk { done, kind, cookie } => {
            let len = reader.read_u32().await?;
            let mut pending = state.take(cookie)?;
            let read = read_chunk(reader, &mut pending, kind, len).await;
            if read.is_err() {
                // Back among the waiting, so that its caller hears of the end like all others.
                state.put(cookie, pending);
                return read;
            }
            if done {
                state.finish(pending)?;
            } else {
                state.put(cookie, pending);
            }
        }
    }
    Ok(())
}

async fn read_chunk(
    reader: &mut (impl AsyncRead + Unpin),
    pending: &mut Pending,
    kind: u16,
    len: u32,
) -> Result<(), ReadError> {
    let wrong_length = |place| CodecError::Length { place, bytes: u64::from(len) };
    match (kind, &mut pending.content) {
        (codec::CHUNK_NONE, _) if len == 0 => {}
        (codec::CHUNK_DATA, Content::Read(reply)) => {
            let data_len = len.checked_sub(8).ok_or_else(|| wrong_length("a chunk of data"))?;
            let offset = reader.read_u64().await?;
            reader.read_exact(reply.data(offset, data_len)?).await?;
        }
        (codec::CHUNK_HOLE, Content::Read(reply)) => {
            if len != 12 {
                return Err(wrong_length("a hole").into());
            }
            let mut payload = [0; 12];
            reader.read_exact(&mut payload).await?;
            let (offset, hole_len) = codec::decode_hole(&payload);
            reply.hole(offset, hole_len)?;
        }
        (codec::CHUNK_STATUS, Content::Status { wanted, found }) => {
            if len > 4 + 8 * STATUS_EXTENTS_MAX {
                return Err(wrong_length("a block status").into());
            }
            let mut payload = vec![0; len as usize];
            reader.read_exact(&mut payload).await?;
            let (context, extents) = codec::decode_status(&payload)?;
            let fresh = wanted.contains(&context) && !found.contains_key(&context);
            if !fresh {
                let found = u64::from(context);
                return Err(CodecError::Stray { place: "context", found }.into());
            }
            found.insert(context, extents);
        }
        (kind, _) if kind >= codec::CHUNK_ERROR => {
            if len > codec::MESSAGE_BYTES_MAX {
                return Err(wrong_length("an error").into());
            }
            let mut payload = vec![0; len as usize];
            reader.read_exact(&mut payload).await?;
            // The first error says most.
            let error = codec::decode_error(&payload)?;
            pending.failure.get_or_insert(error);
        }
        (kind, _) => return Err(CodecError::Chunk { kind, command: pending.command }.into()),
    }
    Ok(())
}
