//! The control stream: small messages in order, both ways.
//!
//! Invariant: a message is sent whole or not at all, and received whole or not at all, also when
//! the future of a send or a receive is dropped half-way (as `select!` does).

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use crate::frame::{FrameError, LENGTH_PREFIX, control_length, decode_control, encode_control};
use crate::session::{RecvError, SendError, SessionInner};

/// Messages that wait to be written; senders wait when there are more.
const CONTROL_QUEUE: usize = 16;
/// Priority of the control stream among the streams of a connection: above every batch.
pub(crate) const CONTROL_PRIORITY: i32 = 100;
/// Most bytes taken from the stream at a time beyond what a frame needs.
const READ_AHEAD: usize = 64 * 1024;

enum Item {
    Frame(Bytes),
    /// No more frames; answer when the peer has all of them.
    Finish(oneshot::Sender<()>),
}

/// The sending half of the control stream. Clones send on the same stream.
#[derive(Clone)]
pub struct ControlSender {
    queue: mpsc::Sender<Item>,
    session: Arc<SessionInner>,
}

impl std::fmt::Debug for ControlSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlSender").finish_non_exhaustive()
    }
}

impl ControlSender {
    /// Starts the task that writes; it ends with the last sender or with the connection.
    pub(crate) fn new(stream: SendStream, session: Arc<SessionInner>) -> Self {
        let (queue, items) = mpsc::channel(CONTROL_QUEUE);
        tokio::spawn(write_all(stream, items));
        Self { queue, session }
    }

    /// Sends one message. Returns once it is queued behind at most a few others; that it arrived is
    /// known from the peer's answer or from [`finish`](Self::finish).
    ///
    /// # Errors
    /// The message is larger than [`MAX_CONTROL_FRAME`](crate::MAX_CONTROL_FRAME), or the session
    /// ended.
    pub async fn send<M: Serialize>(&self, message: &M) -> Result<(), SendError> {
        let frame = Bytes::from(encode_control(message)?);
        self.queue.send(Item::Frame(frame)).await.map_err(|_| self.ended())
    }

    /// Ends this direction and waits until the peer's QUIC has every message. Call it before
    /// closing a session in which the last words matter: closing drops what is still under way.
    ///
    /// # Errors
    /// The session ended before all was acknowledged.
    pub async fn finish(&self) -> Result<(), SendError> {
        let (done, finished) = oneshot::channel();
        self.queue.send(Item::Finish(done)).await.map_err(|_| self.ended())?;
        finished.await.map_err(|_| self.ended())
    }

    fn ended(&self) -> SendError {
        self.session.close_reason().map_or(SendError::Finished, SendError::Closed)
    }
}

async fn write_all(mut stream: SendStream, mut items: mpsc::Receiver<Item>) {
    while let Some(item) = items.recv().await {
        match item {
            Item::Frame(frame) => {
                if stream.write_chunk(frame).await.is_err() {
                    return;
                }
            }
            Item::Finish(done) => {
                items.close();
                if stream.finish().is_ok() && matches!(stream.stopped().await, Ok(None)) {
                    // Nobody waits any more if this fails.
                    let _ = done.send(());
                }
                return;
            }
        }
    }
}

/// The receiving half of the control stream.
pub struct ControlReceiver {
    stream: RecvStream,
    buffer: BytesMut,
    session: Arc<SessionInner>,
}

impl std::fmt::Debug for ControlReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlReceiver").finish_non_exhaustive()
    }
}

impl ControlReceiver {
    pub(crate) fn new(stream: RecvStream, session: Arc<SessionInner>) -> Self {
        Self { stream, buffer: BytesMut::new(), session }
    }

    /// The next message; `None` once the peer has finished its direction. Dropping the future loses
    /// nothing.
    ///
    /// # Errors
    /// The session ended, or the peer sent what is no message of type `M`, which ends the session.
    pub async fn recv<M: DeserializeOwned>(&mut self) -> Result<Option<M>, RecvError> {
        match self.frame().await? {
            Some(frame) => match decode_control(&frame) {
                Ok(message) => Ok(Some(message)),
                Err(error) => Err(self.session.violation(error)),
            },
            None => Ok(None),
        }
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, RecvError> {
        loop {
            if let Some(&prefix) = self.buffer.first_chunk::<LENGTH_PREFIX>() {
                let length = match control_length(prefix) {
                    Ok(length) => LENGTH_PREFIX + length,
                    Err(error) => return Err(self.session.violation(error)),
                };
                if self.buffer.len() >= length {
                    let frame = self.buffer.split_to(length).freeze();
                    return Ok(Some(frame.slice(LENGTH_PREFIX..)));
                }
            }
            match self.stream.read_chunk(READ_AHEAD, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => {
                    let what = "control stream";
                    return Err(self.session.violation(FrameError::Truncated { what }));
                }
                Err(error) => return Err(self.session.read_failed(error)),
            }
        }
    }
}
