//! A session with a peer that has proved its key: over one QUIC connection, or over several, one after
//! another, if it has the patience ([`Session::set_patience`]), and side by side, if one core is the
//! limit ([`Tuning::lanes`](crate::Tuning::lanes)).
//!
//! Invariant: the session lives as long as anyone holds it or a half of its control stream, and not
//! longer. Whoever drops the last of them without [`Session::close`] tells the peer so.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::class::Class;
use crate::close::{CloseCode, CloseReason};
use crate::control::{ControlReceiver, ControlSender, Incoming, Messages};
use crate::dial::Dial;
use crate::endpoint::Shared;
use crate::errors::ConnectError;
use crate::fingerprint::Fingerprint;
use crate::frame::{FrameError, Hello};
use crate::inbox::Batch;
use crate::keeper::{self, Role, Streams};
use crate::lanes;
use crate::link::{Line, Link};
use crate::outbox;
use crate::rate::JobRate;
use crate::stats::PathStats;

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

pub(crate) struct SessionInner {
    pub(crate) link: Arc<Link>,
    peer: Fingerprint,
    info: PeerInfo,
    /// Where its lanes connect to; only the side that connected knows.
    dial: Option<Dial>,
    control: Mutex<Option<mpsc::Receiver<Incoming>>>,
}

impl std::fmt::Debug for SessionInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionInner").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Drop for SessionInner {
    fn drop(&mut self) {
        // Does nothing if the session has ended already.
        let reason = "the session was given up".to_owned();
        self.link.end_with(CloseCode::Shutdown, CloseReason::Local { reason });
    }
}

/// A connection with a proved peer. Cheap to clone; all clones are the same session.
#[derive(Debug, Clone)]
pub struct Session(Arc<SessionInner>);

impl Session {
    /// Makes a session of a connection whose greeting is done, and keeps it until it ends.
    pub(crate) fn begin(
        shared: &Shared,
        line: Arc<Line>,
        peer: Fingerprint,
        hello: &Hello,
        control: (SendStream, RecvStream),
        role: Role,
    ) -> Self {
        let (messages, incoming) = Messages::new();
        let window = shared.tuning.connection_window();
        let link = Arc::new(Link::new(shared.home.clone(), line.clone(), messages, window));
        let receipts = link.receipts.begin();
        let streams = Streams { line, control, receipts, goes_on: None };
        let dial = match &role {
            Role::Dialer(dial) => Some(dial.clone()),
            Role::Listener(registered) => {
                registered.begun(&link);
                None
            }
        };
        link.home.spawn(keeper::keep(link.clone(), role, streams));
        link.home.spawn(lanes::watch(link.clone(), dial.clone(), shared.tuning.lanes));
        let info = PeerInfo {
            agent_version: hello.agent_version.clone(),
            capabilities: hello.capabilities,
        };
        Self(Arc::new(SessionInner { link, peer, info, dial, control: Mutex::new(Some(incoming)) }))
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
        canonical(self.0.link.line().connection.remote_address())
    }

    /// The two halves of the control stream, the first time it is called.
    pub fn control(&self) -> Option<(ControlSender, ControlReceiver)> {
        let incoming = self.0.control.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let receiver = ControlReceiver::new(incoming, self.0.clone());
        Some((ControlSender::new(self.0.clone()), receiver))
    }

    /// Sends under the caps of `job`: what leaves from now on, batches from the next one on. Without
    /// this there is no cap.
    pub fn set_rate(&self, job: JobRate) {
        self.0.link.change_all(|link| link.set_rate(job.clone()));
    }

    /// Lets the session outlive its connection: while the link is down for up to this long, sends and
    /// receives wait instead of failing, and then go on where they were; what had arrived is not sent
    /// again. The lower patience of the two ends counts, and each hears of the other's while the link
    /// is up. Zero, as at the beginning, ends the session with its connection.
    pub fn set_patience(&self, patience: Duration) {
        self.0.link.change_all(|link| link.set_patience(patience));
    }

    /// Opens one more connection beside those of this session, with a thread of its own at both ends; a
    /// session that a core keeps from going faster does so by itself. Bulk then takes whichever has the
    /// least to do. Several connections take several shares of a link.
    ///
    /// # Errors
    /// The peer cannot be reached or has enough of them, or this is not the side that has connected.
    pub async fn widen(&self) -> Result<(), ConnectError> {
        match &self.0.dial {
            Some(dial) => lanes::open(&self.0.link, dial).await,
            None => {
                let detail = "only the side that connected can connect again".to_owned();
                let reason = CloseReason::Transport { detail };
                Err(ConnectError::Failed { addr: self.remote_addr(), reason })
            }
        }
    }

    /// For how long the link has been silent, or gone, if it is.
    pub fn down_for(&self) -> Option<Duration> {
        self.view().down_for()
    }

    /// Makes what this side sends yield to everything else on its way, or take its share again. Takes
    /// hold within a round trip; without effect under [`Congestion::Cubic`](crate::Congestion::Cubic).
    pub fn set_background(&self, background: bool) {
        self.0.link.change_all(|link| link.set_background(background));
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
        outbox::send(&self.0.link.carrier(class), class, header, body).await.map(drop)
    }

    /// As [`send_batch`](Self::send_batch), and waits until the peer's session has the whole batch.
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
        let acked = outbox::send(&self.0.link.carrier(class), class, header, body).await?;
        match acked.await {
            Ok(result) => result,
            // The task that waits for the peer ends only with the runtime.
            Err(_) => Err(SendError::BatchRefused { class }),
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
        self.view().stats()
    }

    /// Looks at this session from now on without keeping it.
    pub fn view(&self) -> SessionView {
        SessionView(self.0.link.clone())
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
        self.0.link.end_with(code, CloseReason::Local { reason: reason.to_owned() });
    }

    /// Waits until the session has ended and says why.
    pub async fn closed(&self) -> CloseReason {
        self.0.link.ended().await
    }

    /// Why the session ended, if it did.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.0.link.end_reason()
    }
}

/// Looks at a session, also after it has ended; it ends as if nobody looked.
#[derive(Debug, Clone)]
pub struct SessionView(Arc<Link>);

impl SessionView {
    /// As [`Session::stats`].
    pub fn stats(&self) -> PathStats {
        self.0.stats_of_all()
    }

    /// As [`Session::down_for`].
    pub fn down_for(&self) -> Option<Duration> {
        self.0.any_down_for()
    }

    /// As [`Session::closed`].
    pub async fn closed(&self) -> CloseReason {
        self.0.ended().await
    }
}

/// IPv4 as IPv4, also where a dual-stack socket reports it as mapped into IPv6.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
