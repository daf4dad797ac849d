//! A session: one QUIC connection with a peer that has proved its key.
//!
//! Invariant: the connection lives as long as anyone holds the session or a half of its control
//! stream, and not longer. Whoever drops the last of them without [`Session::close`] tells the
//! peer so.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use quinn::{Connection, ReadError, RecvStream, SendStream, StoppedError};
use thiserror::Error;

use crate::class::Class;
use crate::close::{CloseCode, CloseReason, short};
use crate::congestion::PathView;
use crate::control::{ControlReceiver, ControlSender};
use crate::fingerprint::Fingerprint;
use crate::frame::{FrameError, Hello};
use crate::inbox::{self, Batch, Inbox};
use crate::outbox::{self, Slots};
use crate::pace::{PacedSocket, Pacing};
use crate::rate::{JobRate, RateLimiter};
use crate::stats::{Counters, PathStats};

/// Why something could not be sent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SendError {
    /// What was to be sent breaks a limit or does not encode; nothing was sent.
    #[error("cannot be sent: {0}")]
    Frame(#[from] FrameError),
    /// The peer stopped reading this batch.
    #[error("the peer refused a batch of class {class}")]
    BatchRefused {
        /// Its class.
        class: Class,
    },
    /// The control stream was finished on this side.
    #[error("the control stream is finished, nothing can follow")]
    Finished,
    /// The session ended.
    #[error("cannot be sent: {0}")]
    Closed(CloseReason),
}

/// Why nothing more can be received.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecvError {
    /// The peer sent what this version does not allow; the session was closed for it.
    #[error("the peer broke the protocol: {0}")]
    Frame(FrameError),
    /// The session ended.
    #[error("{0}")]
    Closed(CloseReason),
}

/// What a peer said about itself in its greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Version of its agent; for people, not for decisions.
    pub agent_version: String,
    /// What it can do beyond the protocol version.
    pub capabilities: u64,
}

/// What the tasks of a session share. Holds no connection, so that it keeps none alive.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) inbox: Inbox,
    pub(crate) counters: Counters,
    pub(crate) slots: Slots,
    /// Urgent bytes that are not acknowledged; the send window makes room for them.
    pub(crate) urgent_unacked: AtomicU64,
    /// Send and receive window of the connection.
    pub(crate) connection_window: u64,
    pub(crate) pacing: Pacing,
    ended: OnceLock<CloseReason>,
}

impl Link {
    /// Closes the connection because the peer broke the protocol.
    pub(crate) fn violation(&self, connection: &Connection, error: &FrameError) {
        let detail = error.to_string();
        tracing::warn!(peer = %connection.remote_address(), %detail, "the peer broke the protocol");
        connection.close(CloseCode::Violation.value(), short(&detail).as_bytes());
        let _ = self.ended.set(CloseReason::Violation { detail });
    }
}

#[derive(Debug)]
pub(crate) struct SessionInner {
    pub(crate) connection: Connection,
    pub(crate) link: Arc<Link>,
    peer: Fingerprint,
    info: PeerInfo,
    control: Mutex<Option<(SendStream, RecvStream)>>,
    rate: Mutex<JobRate>,
}

impl SessionInner {
    /// Why the session ended, if it did.
    pub(crate) fn close_reason(&self) -> Option<CloseReason> {
        let error = self.connection.close_reason()?;
        Some(CloseReason::from_quic(&error, self.link.ended.get()))
    }

    /// The reason for an operation that failed because the connection is gone.
    pub(crate) fn ended(&self, error: &quinn::ConnectionError) -> CloseReason {
        CloseReason::from_quic(error, self.link.ended.get())
    }

    pub(crate) fn violation(&self, error: FrameError) -> RecvError {
        self.link.violation(&self.connection, &error);
        RecvError::Frame(error)
    }

    pub(crate) fn read_failed(&self, error: ReadError) -> RecvError {
        match error {
            ReadError::ConnectionLost(error) => RecvError::Closed(self.ended(&error)),
            // Only a peer that does not speak our protocol resets its control stream.
            _ => self.violation(FrameError::Truncated { what: "control stream" }),
        }
    }

    pub(crate) fn rate(&self) -> JobRate {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for SessionInner {
    fn drop(&mut self) {
        // Does nothing if the connection is closed already.
        self.connection.close(CloseCode::Shutdown.value(), b"the session was given up");
    }
}

/// A connection with a proved peer. Cheap to clone; all clones are the same session.
#[derive(Debug, Clone)]
pub struct Session(Arc<SessionInner>);

impl Session {
    /// Makes a session of a connection whose greeting is done. Spawns the task that receives.
    pub(crate) fn new(
        connection: Connection,
        peer: Fingerprint,
        hello: Hello,
        control: (SendStream, RecvStream),
        connection_window: u64,
        socket: Arc<PacedSocket>,
    ) -> Self {
        let pacing = Pacing::new(socket);
        pacing.follow(&connection);
        let link = Arc::new(Link {
            inbox: Inbox::new(),
            counters: Counters::default(),
            slots: Slots::new(),
            urgent_unacked: AtomicU64::new(0),
            connection_window,
            pacing,
            ended: OnceLock::new(),
        });
        tokio::spawn(inbox::receive(connection.clone(), link.clone()));
        let info =
            PeerInfo { agent_version: hello.agent_version, capabilities: hello.capabilities };
        Self(Arc::new(SessionInner {
            connection,
            link,
            peer,
            info,
            control: Mutex::new(Some(control)),
            rate: Mutex::new(RateLimiter::new().job()),
        }))
    }

    /// The peer's key.
    pub fn peer(&self) -> Fingerprint {
        self.0.peer
    }

    /// What the peer said about itself.
    pub fn peer_info(&self) -> &PeerInfo {
        &self.0.info
    }

    /// Where the peer is now; changes when its address does. IPv4 is shown as IPv4 also on a
    /// socket that serves both.
    pub fn remote_addr(&self) -> SocketAddr {
        canonical(self.0.connection.remote_address())
    }

    /// The two halves of the control stream, the first time it is called.
    pub fn control(&self) -> Option<(ControlSender, ControlReceiver)> {
        let halves = self.0.control.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (send, recv) = halves?;
        Some((ControlSender::new(send, self.0.clone()), ControlReceiver::new(recv, self.0.clone())))
    }

    /// Sends batches under the caps of `job` from the next one on. Without this there is no cap.
    pub fn set_rate(&self, job: JobRate) {
        *self.0.rate.lock().unwrap_or_else(PoisonError::into_inner) = job;
    }

    /// Makes what this side sends yield to everything else on its way, or take its share again. Takes
    /// hold within a round trip; without effect under [`Congestion::Cubic`](crate::Congestion::Cubic).
    pub fn set_background(&self, background: bool) {
        if let Some(view) = PathView::of(&self.0.connection) {
            view.background.store(background, Ordering::Relaxed);
        }
    }

    /// Sends `header` and `body` as one batch on a stream of its own. Returns once QUIC has taken
    /// it: the rate caps have let it pass and it fits into the send window. Batches arrive in any
    /// order. Dropping the future abandons the batch; the peer then sees nothing of it.
    ///
    /// The pieces of `body` are not copied. For speed, a batch should have 1 to 4 MiB.
    ///
    /// # Errors
    /// The batch is larger than [`MAX_BATCH_BYTES`](crate::MAX_BATCH_BYTES), or the session ended.
    pub async fn send_batch(
        &self,
        class: Class,
        header: &[u8],
        body: Vec<Bytes>,
    ) -> Result<(), SendError> {
        outbox::send(&self.0, class, header, body).await.map(drop)
    }

    /// As [`send_batch`](Self::send_batch), and waits until the peer's QUIC has the whole batch.
    /// That its agent has done something with it only the agent's answer says.
    ///
    /// # Errors
    /// As `send_batch`, or the session ended before the acknowledgement, or the peer refused the
    /// batch.
    pub async fn send_batch_acked(
        &self,
        class: Class,
        header: &[u8],
        body: Vec<Bytes>,
    ) -> Result<(), SendError> {
        let acked = outbox::send(&self.0, class, header, body).await?;
        match acked.await {
            Ok(Ok(None)) => Ok(()),
            Ok(Err(StoppedError::ConnectionLost(error))) => {
                Err(SendError::Closed(self.0.ended(&error)))
            }
            Ok(Ok(Some(_)) | Err(_)) | Err(_) => Err(SendError::BatchRefused { class }),
        }
    }

    /// The next batch, the most urgent first among those that are complete. What arrived before the
    /// session ended is still handed out.
    ///
    /// # Errors
    /// The session ended, or the peer broke the protocol.
    pub async fn recv_batch(&self) -> Result<Batch, RecvError> {
        match self.0.link.inbox.next().await {
            Some(batch) => Ok(batch),
            None => Err(RecvError::Closed(self.closed().await)),
        }
    }

    /// What this session has cost and carried so far.
    pub fn stats(&self) -> PathStats {
        let quic = self.0.connection.stats();
        let rates = self.0.link.pacing.rates();
        self.0.link.counters.snapshot(&quic, self.remote_addr(), rates)
    }

    /// Closes the session because all is done. What is still under way is dropped, so finish the
    /// control stream or have the peer's last answer first.
    pub fn close(&self, reason: &str) {
        self.close_with(CloseCode::Done, reason);
    }

    /// Closes the session because this side does not want to go on; the peer gets `reason`.
    pub fn refuse(&self, reason: &str) {
        self.close_with(CloseCode::Refused, reason);
    }

    fn close_with(&self, code: CloseCode, reason: &str) {
        let _ = self.0.link.ended.set(CloseReason::Local { reason: reason.to_owned() });
        self.0.connection.close(code.value(), short(reason).as_bytes());
    }

    /// Waits until the session has ended and says why.
    pub async fn closed(&self) -> CloseReason {
        let error = self.0.connection.closed().await;
        self.0.ended(&error)
    }

    /// Why the session ended, if it did.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.0.close_reason()
    }
}

/// IPv4 as IPv4, also where a dual-stack socket reports it as mapped into IPv6.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
