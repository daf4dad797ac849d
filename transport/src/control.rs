//! The control stream: small messages in order, both ways, over one connection after another.
//!
//! Invariant: a message is sent whole or not at all, and received once and whole or not at all, also
//! when the future of a send or a receive is dropped half-way (as `select!` does), and when the
//! connection that carried it is lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::frame::{
    CONTROL_END, FrameError, LENGTH_PREFIX, control_length, decode_control, encode_control,
    is_control_end,
};
use crate::kept::Kept;
use crate::link::Link;
use crate::session::{RecvError, SendError, SessionInner};
use crate::watched::Watched;

/// Bytes of messages that the peer is not known to have; senders wait when there are more.
const KEPT_BYTES: usize = 4 * 1024 * 1024;
/// The same as a number of messages.
const KEPT_MESSAGES: usize = 4096;
/// Messages that wait for [`ControlReceiver::recv`].
const WAITING: usize = 4;
/// The peer is told how much has arrived after so many messages or bytes.
const TELL_AFTER: (u64, usize) = (64, 256 * 1024);
/// Priority of the control stream among the streams of a connection: above every batch.
pub(crate) const CONTROL_PRIORITY: i32 = 100;
/// Most bytes taken from the stream at a time beyond what a frame needs.
const READ_AHEAD: usize = 64 * 1024;

/// What waits for the receiver: a message, the end, or what the peer did wrong.
pub(crate) type Incoming = Result<Option<Bytes>, FrameError>;

#[derive(Debug)]
struct Out {
    kept: Kept<Bytes>,
    bytes: usize,
    finished: bool,
}

/// The messages of a session, whatever connection carries them.
#[derive(Debug)]
pub(crate) struct Messages {
    /// Waited for until something is to be written, or there is room, or the peer has counted.
    out: Watched<Out>,
    received: AtomicU64,
    /// Gone once nothing more can come.
    incoming: Mutex<Option<mpsc::Sender<Incoming>>>,
}

impl Messages {
    /// No message yet, and where they will come out.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Incoming>) {
        let (incoming, waiting) = mpsc::channel(WAITING);
        let out = Out { kept: Kept::new("control messages"), bytes: 0, finished: false };
        let messages = Self {
            out: Watched::new(out),
            received: AtomicU64::new(0),
            incoming: Mutex::new(Some(incoming)),
        };
        (messages, waiting)
    }

    /// Messages that have arrived.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// The peer has `count` messages.
    pub(crate) fn seen(&self, count: u64) -> Result<(), FrameError> {
        self.out.change(|out| {
            let bytes: usize = out.kept.let_go(count)?.map(|frame| frame.len()).sum();
            out.bytes -= bytes;
            Ok(())
        })
    }

    /// Adds a frame once there is room; its count, or `None` if the end was sent.
    async fn push(&self, frame: Bytes, is_end: bool) -> Option<u64> {
        let count = self
            .out
            .until(|out| {
                if out.finished {
                    return Some(None);
                }
                let has_room = out.bytes < KEPT_BYTES && out.kept.len() < KEPT_MESSAGES;
                has_room.then(|| {
                    out.bytes += frame.len();
                    out.finished = is_end;
                    Some(out.kept.push(frame.clone()))
                })
            })
            .await;
        self.out.wake();
        count
    }

    /// Writes to a connection what its peer does not have, from message `next` on, until it is lost.
    pub(crate) async fn write(&self, stream: &mut SendStream, mut next: u64) {
        loop {
            let frame = self.out.until(|out| out.kept.get(next).cloned()).await;
            if stream.write_chunk(frame).await.is_err() {
                return;
            }
            next += 1;
        }
    }

    fn incoming(&self) -> MutexGuard<'_, Option<mpsc::Sender<Incoming>>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more will come: the receiver ends behind what waits for it.
    pub(crate) fn end(&self) {
        *self.incoming() = None;
    }

    /// Takes messages from a connection until it is lost. What is half here then is not counted.
    pub(crate) async fn read(link: &Link, connection: &Connection, stream: RecvStream) {
        let messages = &link.messages;
        let Some(incoming) = messages.incoming().clone() else { return };
        let mut frames = Frames { stream, buffer: BytesMut::new() };
        let (mut told, mut bytes) = (messages.received(), 0);
        loop {
            // Room first: a message that is taken is counted.
            let Ok(room) = incoming.reserve().await else { return };
            let frame = match frames.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(error) => {
                    link.violation(connection, &error);
                    room.send(Err(error));
                    return;
                }
            };
            let received = messages.received.fetch_add(1, Ordering::Relaxed) + 1;
            bytes += frame.len();
            let is_end = is_control_end(&frame);
            if is_end || received - told >= TELL_AFTER.0 || bytes >= TELL_AFTER.1 {
                link.receipts.tell();
                (told, bytes) = (received, 0);
            }
            room.send(Ok((!is_end).then_some(frame)));
        }
    }
}

/// Takes the first frame out of `buffer`, without its length; `None` if it is not whole yet.
pub(crate) fn next_frame(buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(&prefix) = buffer.first_chunk::<LENGTH_PREFIX>() else { return Ok(None) };
    let length = LENGTH_PREFIX + control_length(prefix)?;
    if buffer.len() < length {
        return Ok(None);
    }
    Ok(Some(buffer.split_to(length).freeze().slice(LENGTH_PREFIX..)))
}

/// Cuts a stream into frames.
struct Frames {
    stream: RecvStream,
    buffer: BytesMut,
}

impl Frames {
    /// The next frame, without its length; `None` once the connection is lost.
    async fn next(&mut self) -> Result<Option<Bytes>, FrameError> {
        loop {
            if let Some(frame) = next_frame(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            match self.stream.read_chunk(READ_AHEAD, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Err(ReadError::ConnectionLost(_)) => return Ok(None),
                // A direction ends with a frame that says so; the stream itself stays.
                Ok(None) | Err(_) => {
                    return Err(FrameError::Truncated { what: "control stream" });
                }
            }
        }
    }
}

/// The sending half of the control stream. Clones send on the same stream.
#[derive(Clone)]
pub struct ControlSender(Arc<SessionInner>);

impl std::fmt::Debug for ControlSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlSender").finish_non_exhaustive()
    }
}

impl ControlSender {
    pub(crate) fn new(session: Arc<SessionInner>) -> Self {
        Self(session)
    }

    /// Sends one message. Returns once it is queued; that it arrived is known from the peer's answer
    /// or from [`finish`](Self::finish). While the link is down, messages are kept.
    ///
    /// # Errors
    /// The message is larger than [`MAX_CONTROL_FRAME`](crate::MAX_CONTROL_FRAME), or the session
    /// ended.
    pub async fn send<M: Serialize>(&self, message: &M) -> Result<(), SendError> {
        let frame = Bytes::from(encode_control(message)?);
        self.push(frame, false).await.map(drop)
    }

    /// Ends this direction and waits until the peer has every message. Call it before closing a
    /// session in which the last words matter: closing drops what is still under way.
    ///
    /// # Errors
    /// The session ended before all had arrived.
    pub async fn finish(&self) -> Result<(), SendError> {
        let count = self.push(Bytes::from_static(&CONTROL_END), true).await?;
        let messages = &self.0.link.messages;
        tokio::select! {
            biased;
            () = messages.out.until(|out| (out.kept.seen() >= count).then_some(())) => Ok(()),
            reason = self.0.link.ended() => Err(SendError::Closed(reason)),
        }
    }

    async fn push(&self, frame: Bytes, is_end: bool) -> Result<u64, SendError> {
        tokio::select! {
            biased;
            reason = self.0.link.ended() => Err(SendError::Closed(reason)),
            count = self.0.link.messages.push(frame, is_end) => count.ok_or(SendError::Finished),
        }
    }
}

/// The receiving half of the control stream.
pub struct ControlReceiver {
    incoming: mpsc::Receiver<Incoming>,
    finished: bool,
    session: Arc<SessionInner>,
}

impl std::fmt::Debug for ControlReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlReceiver").finish_non_exhaustive()
    }
}

impl ControlReceiver {
    pub(crate) fn new(incoming: mpsc::Receiver<Incoming>, session: Arc<SessionInner>) -> Self {
        Self { incoming, finished: false, session }
    }

    /// The next message; `None` once the peer has finished its direction. Dropping the future loses
    /// nothing.
    ///
    /// # Errors
    /// The session ended, or the peer sent what is no message of type `M`, which ends the session.
    pub async fn recv<M: DeserializeOwned>(&mut self) -> Result<Option<M>, RecvError> {
        if self.finished {
            return Ok(None);
        }
        let Some(incoming) = self.incoming.recv().await else {
            return Err(RecvError::Closed(self.session.link.ended().await));
        };
        let Some(frame) = incoming.map_err(RecvError::Frame)? else {
            self.finished = true;
            return Ok(None);
        };
        decode_control(&frame).map(Some).map_err(|error| {
            self.session.link.violation(&self.session.link.line().connection, &error);
            RecvError::Frame(error)
        })
    }
}
