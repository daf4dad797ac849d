//! Pacing below QUIC: packets of a connection leave no faster than its controller wants.
//!
//! Invariant: towards one address a batch leaves only when all before it are paid for at the rate of
//! the connections that go there, and what a late timer has missed is made up for at most
//! [`CREDIT_TIME`].
//!
//! quinn asks its socket before each batch, and a socket may say "not now": that is the one place
//! below quinn's own pacer where a rate can be kept without changing quinn. The socket does not learn
//! which connection asks until it is handed a batch; so the batch is refused there, and the same
//! connection's poller, which quinn asks next and on the same thread, waits for the time.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::{Instant, Sleep};

use crate::congestion::PathView;
use crate::socket::segments_in_a_message;
use crate::tuning::ETHERNET_PAYLOAD;

/// What a late timer may catch up on: tokio's tick in milliseconds, and a busy host.
const CREDIT_TIME: Duration = Duration::from_millis(4);

/// What one batch may take to leave.
const BATCH_TIME: Duration = Duration::from_millis(1);

thread_local! {
    /// When the batch that was just refused on this thread may leave.
    static REFUSED_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The way to one address.
#[derive(Debug)]
struct Lane {
    views: Vec<Weak<PathView>>,
    /// Bytes that may leave at once; below zero they have to be waited for.
    credit: f64,
    filled: Instant,
}

impl Lane {
    /// Bytes a second; none if something goes there unpaced.
    fn rate(&mut self) -> Option<f64> {
        self.views.retain(|view| view.strong_count() > 0);
        let mut sum = 0;
        for view in self.views.iter().filter_map(Weak::upgrade) {
            match view.pacing_rate.load(Ordering::Relaxed) {
                0 => return None,
                rate => sum += rate,
            }
        }
        (sum > 0).then_some(sum as f64)
    }

    /// Whether something may leave now, or else when. It is to be paid for with credit.
    fn may_pass(&mut self, now: Instant) -> Result<(), Instant> {
        let Some(rate) = self.rate() else {
            (self.credit, self.filled) = (0.0, now);
            return Ok(());
        };
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * rate;
        self.credit = (self.credit + gained).min(CREDIT_TIME.as_secs_f64() * rate);
        self.filled = now;
        // Less than a byte is nothing: the wait for it would be too short to pass.
        if self.credit < -1.0 {
            return Err(now + Duration::from_secs_f64(-self.credit / rate));
        }
        Ok(())
    }
}

/// A socket that paces what leaves over it.
pub(crate) struct PacedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Segments that one message holds.
    segments: usize,
    lanes: Mutex<HashMap<SocketAddr, Lane>>,
}

impl PacedSocket {
    /// Paces what leaves over `inner`, in payloads of up to `max_payload` bytes.
    pub(crate) fn new(inner: Arc<dyn AsyncUdpSocket>, max_payload: u16) -> Arc<Self> {
        let segments = segments_in_a_message(&*inner, max_payload);
        Arc::new(Self { inner, segments, lanes: Mutex::default() })
    }

    /// Paces what goes to `remote` by `view` too, for as long as that lives.
    pub(crate) fn pace(&self, remote: SocketAddr, view: &Arc<PathView>) {
        let mut lanes = self.lanes();
        lanes.retain(|_, lane| lane.views.iter().any(|view| view.strong_count() > 0));
        let new = || Lane { views: Vec::new(), credit: 0.0, filled: Instant::now() };
        let lane = lanes.entry(remote).or_insert_with(new);
        let view = Arc::downgrade(view);
        if !lane.views.iter().any(|known| known.ptr_eq(&view)) {
            lane.views.push(view);
        }
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<SocketAddr, Lane>> {
        // Whole after every operation.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's pacing: keeps to the path that it has now.
#[derive(Debug)]
pub(crate) struct Pacing {
    socket: Arc<PacedSocket>,
    /// Where the peer is, and the view of the way there; of other controllers than ours there is none.
    path: Mutex<Option<(SocketAddr, Option<Arc<PathView>>)>>,
}

impl Pacing {
    pub(crate) fn new(socket: Arc<PacedSocket>) -> Self {
        Self { socket, path: Mutex::default() }
    }

    /// Sees to it that the connection is paced where its peer is now.
    pub(crate) fn follow(&self, connection: &quinn::Connection) {
        let remote = connection.remote_address();
        let mut path = self.path();
        if path.as_ref().is_some_and(|(known, _)| *known == remote) {
            return;
        }
        let view = PathView::of(connection);
        if let Some(view) = &view {
            if let Some((_, Some(before))) = &*path {
                let background = before.background.load(Ordering::Relaxed);
                view.background.store(background, Ordering::Relaxed);
            }
            self.socket.pace(remote, view);
        }
        *path = Some((remote, view));
    }

    /// What the controller knows of the path: its pacing rate and what it is thought to carry, in
    /// bytes a second; 0 while that is not known.
    pub(crate) fn rates(&self) -> [u64; 2] {
        match &*self.path() {
            Some((_, Some(view))) => {
                [&view.pacing_rate, &view.bandwidth].map(|rate| rate.load(Ordering::Relaxed))
            }
            _ => [0; 2],
        }
    }

    fn path(&self) -> MutexGuard<'_, Option<(SocketAddr, Option<Arc<PathView>>)>> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PacedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedSocket").field("lanes", &self.lanes().len()).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for PacedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(PacedPoller { inner: Arc::clone(&self.inner).create_io_poller(), wait: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let bytes = transmit.contents.len() as f64;
        if let Some(lane) = self.lanes().get_mut(&transmit.destination) {
            if let Err(until) = lane.may_pass(Instant::now()) {
                REFUSED_UNTIL.set(Some(until));
                return Err(io::ErrorKind::WouldBlock.into());
            }
            lane.credit -= bytes;
        }
        self.inner.try_send(transmit).inspect_err(|_| {
            if let Some(lane) = self.lanes().get_mut(&transmit.destination) {
                lane.credit += bytes;
            }
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        let slowest = self.lanes().values_mut().filter_map(Lane::rate).reduce(f64::min);
        slowest.map_or(self.segments, |rate| {
            // A batch is stamped as sent before it is refused here: what it then waits for the batch
            // before it would look like a queue on the path.
            let batch = rate * BATCH_TIME.as_secs_f64() / f64::from(ETHERNET_PAYLOAD);
            (batch as usize).clamp(1, self.segments)
        })
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// One connection's place at the socket.
struct PacedPoller {
    inner: Pin<Box<dyn UdpPoller>>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for PacedPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedPoller").finish_non_exhaustive()
    }
}

impl UdpPoller for PacedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(until) = REFUSED_UNTIL.take() {
            match &mut self.wait {
                Some(wait) => wait.as_mut().reset(until),
                None => self.wait = Some(Box::pin(tokio::time::sleep_until(until))),
            }
        }
        if let Some(wait) = &mut self.wait
            && !wait.is_elapsed()
        {
            ready!(wait.as_mut().poll(cx));
        }
        self.inner.as_mut().poll_writable(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(view: &Arc<PathView>) -> Lane {
        Lane { views: vec![Arc::downgrade(view)], credit: 0.0, filled: Instant::now() }
    }

    #[tokio::test(start_paused = true)]
    async fn what_leaves_keeps_to_the_rate_and_late_timers_cost_nothing() {
        let view = Arc::new(PathView::default());
        view.pacing_rate.store(10_000_000, Ordering::Relaxed);
        let mut lane = lane(&view);
        let (began, mut sent) = (Instant::now(), 0.0);
        while began.elapsed() < Duration::from_secs(2) {
            match lane.may_pass(Instant::now()) {
                Ok(()) => {
                    lane.credit -= 14_000.0;
                    sent += 14_000.0;
                }
                // A timer that is up to two milliseconds late.
                Err(until) => tokio::time::sleep_until(until + Duration::from_millis(1)).await,
            }
        }
        let rate = sent / began.elapsed().as_secs_f64();
        assert!((9_900_000.0..10_100_000.0).contains(&rate), "{rate}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_not_saved_up() {
        let view = Arc::new(PathView::default());
        view.pacing_rate.store(1_000_000, Ordering::Relaxed);
        let mut lane = lane(&view);
        tokio::time::advance(Duration::from_secs(60)).await;
        let mut sent = 0.0;
        while lane.may_pass(Instant::now()).is_ok() {
            lane.credit -= 1000.0;
            sent += 1000.0;
        }
        assert!(sent <= 1_000_000.0 * CREDIT_TIME.as_secs_f64() + 2000.0, "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_known_or_gone_is_not_paced() {
        let view = Arc::new(PathView::default());
        let mut lane = lane(&view);
        lane.credit = -1e9;
        assert!(lane.may_pass(Instant::now()).is_ok(), "it has no rate yet");
        view.pacing_rate.store(1000, Ordering::Relaxed);
        lane.credit = -1e9;
        assert!(lane.may_pass(Instant::now()).is_err());
        drop(view);
        assert!(lane.may_pass(Instant::now()).is_ok(), "its connection is gone");
    }
}
