//! Pacing and caps below QUIC: what leaves, and when.
//!
//! Invariant: a batch of a connection leaves only when all before it are paid for, at the rate that
//! the connection's controller wants and at those of its job's and the agent's caps. Paid for is
//! what is on the wire: repetitions, acknowledgements and the headers of IP and UDP too. What a late
//! timer has missed is made up for at most [`CREDIT_TIME`], and [`BURST`](crate::BURST) under a cap.
//!
//! quinn asks a poller of the connection before each batch whether it may leave, and hands the batch
//! to the socket right after, on the same thread: that is the one place below quinn's own pacer where
//! a rate can be kept without changing quinn.

use std::cell::Cell;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::Instant;

use crate::congestion::PathView;
use crate::driver::Seat;
use crate::home::Home;
use crate::rate::JobRate;
use crate::socket::segments_in_a_message;
use crate::stats::header_bytes;
use crate::timer::Timer;
use crate::tuning::ETHERNET_PAYLOAD;

/// What a late timer may catch up on: tokio's tick in milliseconds, and a busy host.
const CREDIT_TIME: Duration = Duration::from_millis(4);
/// What one batch may take to leave.
const BATCH_TIME: Duration = Duration::from_millis(1);
/// A wait is looked at anew after this long, because caps change.
const WAIT_MAX: Duration = Duration::from_millis(5);

thread_local! {
    /// The place that quinn has just made on this thread.
    static MADE: Cell<Option<Arc<Place>>> = const { Cell::new(None) };
    /// The place of the connection that hands over a batch on this thread next.
    static SENDER: Cell<Option<Arc<Place>>> = const { Cell::new(None) };
}

/// One connection's place at the socket.
#[derive(Debug)]
pub(crate) struct Place(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Of the task that drives the connection.
    driver: Option<Seat>,
    /// What the controller wants; nothing is known of other controllers than ours.
    view: Option<Arc<PathView>>,
    /// Whether what is sent yields to others.
    background: bool,
    /// The caps, once the connection is a session.
    rate: Option<JobRate>,
    /// Bytes that the controller lets leave at once; below zero they have to be waited for.
    credit: f64,
    filled: Instant,
    /// Bytes that leave whatever the caps say: a hand-over, and what is already before it.
    hurried: u64,
    /// Bytes that left, as they are on the wire.
    left: u64,
}

impl State {
    /// Tells the controller whether to yield.
    fn show_background(&self) {
        if let Some(view) = &self.view {
            view.background.store(self.background, Ordering::Relaxed);
        }
    }

    /// Bytes a second that the controller lets leave; none if it does not care.
    fn pacing_rate(&self) -> Option<u64> {
        let rate = self.view.as_ref()?.pacing_rate.load(Ordering::Relaxed);
        (rate > 0).then_some(rate)
    }

    /// How long the controller lets the next batch wait.
    fn pacing_wait(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        let Some(rate) = self.pacing_rate().map(|rate| rate as f64) else {
            self.credit = 0.0;
            return Duration::ZERO;
        };
        self.credit = (self.credit + elapsed * rate).min(CREDIT_TIME.as_secs_f64() * rate);
        // Less than a byte is nothing: the wait for it would be too short to pass.
        if self.credit < -1.0 {
            Duration::from_secs_f64(-self.credit / rate)
        } else {
            Duration::ZERO
        }
    }
}

impl Place {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            driver: None,
            view: None,
            background: false,
            rate: None,
            credit: 0.0,
            filled: Instant::now(),
            hurried: 0,
            left: 0,
        })))
    }

    /// What `make` returns, and the place of the connection that it makes.
    pub(crate) fn of_new<T>(make: impl FnOnce() -> T) -> (T, Arc<Self>) {
        MADE.take();
        Seat::of_new();
        let made = make();
        let place = MADE.take().unwrap_or_else(Self::new);
        place.state().driver = Seat::of_new();
        (made, place)
    }

    /// Paces by what the controller of another path says.
    fn watch(&self, view: Option<Arc<PathView>>) {
        let mut state = self.state();
        state.view = view;
        state.show_background();
    }

    /// QUIC asks the socket while it holds its connection: nothing that is done with this in hand may
    /// ask a connection.
    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every operation.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something may leave now, or else when to ask again.
    fn may_leave(&self, now: Instant) -> Result<(), Instant> {
        let mut state = self.state();
        let paced = state.pacing_wait(now);
        let capped = match &state.rate {
            Some(rate) if state.hurried == 0 => rate.wait_to_leave(now.into_std()),
            _ => Duration::ZERO,
        };
        if capped > paced
            && let Some(view) = &state.view
        {
            view.is_capped.store(true, Ordering::Relaxed);
        }
        match paced.max(capped) {
            Duration::ZERO => Ok(()),
            wait => Err(now + wait.min(WAIT_MAX)),
        }
    }

    /// `payload` bytes have left in as many `datagrams` with `header` bytes of IP and UDP each.
    fn pay(&self, payload: usize, datagrams: usize, header: u64) {
        let mut state = self.state();
        let wire = payload as u64 + datagrams as u64 * header;
        state.credit -= payload as f64;
        state.hurried = state.hurried.saturating_sub(wire);
        state.left += wire;
        if let Some(rate) = &state.rate {
            rate.left(wire);
        }
    }

    /// Bytes a second at which it may send; none if nothing limits it.
    fn rate(&self) -> Option<u64> {
        let state = self.state();
        let capped = state.rate.as_ref().and_then(JobRate::lowest);
        let capped = capped.map(|rate| rate.bits_per_second() / 8);
        [state.pacing_rate(), capped].into_iter().flatten().min()
    }
}

/// A socket that paces what leaves over it.
pub(crate) struct PacedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// Segments that one message holds.
    segments: usize,
    places: Mutex<Vec<Weak<Place>>>,
}

impl PacedSocket {
    /// Paces what leaves over `inner`, in payloads of up to `max_payload` bytes.
    pub(crate) fn new(inner: Arc<dyn AsyncUdpSocket>, max_payload: u16) -> Arc<Self> {
        let segments = segments_in_a_message(&*inner, max_payload);
        Arc::new(Self { inner, segments, places: Mutex::default() })
    }

    fn places(&self) -> MutexGuard<'_, Vec<Weak<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PacedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedSocket").field("places", &self.places().len()).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for PacedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let place = Place::new();
        let mut places = self.places();
        places.retain(|place| place.strong_count() > 0);
        places.push(Arc::downgrade(&place));
        drop(places);
        MADE.set(Some(place.clone()));
        let inner = Arc::clone(&self.inner).create_io_poller();
        Box::pin(PacedPoller { inner, place, wait: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        // Nobody's are the endpoint's own answers to strangers, which are few.
        let sender = SENDER.take();
        self.inner.try_send(transmit)?;
        if let Some(place) = sender {
            let payload = transmit.contents.len();
            let datagrams = transmit.segment_size.map_or(1, |size| payload.div_ceil(size.max(1)));
            place.pay(payload, datagrams, header_bytes(transmit.destination));
        }
        Ok(())
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
        let places = self.places();
        let slowest =
            places.iter().filter_map(Weak::upgrade).filter_map(|place| place.rate()).min();
        slowest.map_or(self.segments, |rate| {
            // A batch is stamped as sent before it may leave: what it then waits for the batch before
            // it would look like a queue on the path.
            let batch = rate as f64 * BATCH_TIME.as_secs_f64() / f64::from(ETHERNET_PAYLOAD);
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

/// Asks for one connection whether it may send.
struct PacedPoller {
    inner: Pin<Box<dyn UdpPoller>>,
    place: Arc<Place>,
    wait: Option<Timer>,
}

impl fmt::Debug for PacedPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedPoller").field("place", &self.place).finish_non_exhaustive()
    }
}

impl UdpPoller for PacedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Asked anew each time, also by a connection that waits and has got something urgent.
        while let Err(until) = self.place.may_leave(Instant::now()) {
            let wait = match &mut self.wait {
                Some(wait) => {
                    wait.end_at(until);
                    wait
                }
                None => self.wait.insert(Timer::new(until)),
            };
            ready!(wait.wait(cx));
        }
        ready!(self.inner.as_mut().poll_writable(cx))?;
        SENDER.set(Some(self.place.clone()));
        Poll::Ready(Ok(()))
    }
}

/// A session's hold on its place: keeps it to the path that the connection has now, and knows what
/// of that which left has been paid for before QUIC had it.
#[derive(Debug)]
pub(crate) struct Pacing {
    place: Arc<Place>,
    account: Mutex<Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// Where the peer is.
    remote: Option<SocketAddr>,
    /// Wire bytes that were paid for.
    paid: u64,
    /// Wire bytes that were lost so far, to be sent again.
    lost: u64,
}

impl Account {
    /// Wire bytes that are to be paid for beside what is handed to QUIC: what is sent again, and what
    /// left beyond what was thought.
    fn due(&mut self, lost: u64, left: u64) -> u64 {
        let again = lost.saturating_sub(self.lost);
        self.lost = self.lost.max(lost);
        self.paid += again;
        let beyond = left.saturating_sub(self.paid);
        self.paid += beyond;
        again + beyond
    }
}

impl Pacing {
    pub(crate) fn new(place: Arc<Place>) -> Self {
        Self { place, account: Mutex::default() }
    }

    /// Has the connection driven at `home` from now on.
    pub(crate) fn live_at(&self, home: &Arc<Home>) {
        let driver = self.place.state().driver.clone();
        if let Some(driver) = driver {
            driver.move_to(home);
        }
    }

    /// Sees to it that the connection is paced as its path is now.
    pub(crate) fn follow(&self, connection: &quinn::Connection) {
        let remote = Some(connection.remote_address());
        let mut account = self.account();
        if account.remote != remote {
            account.remote = remote;
            self.place.watch(PathView::of(connection));
        }
    }

    /// Makes what is sent yield to others, or not.
    pub(crate) fn set_background(&self, background: bool) {
        let mut state = self.place.state();
        state.background = background;
        state.show_background();
    }

    pub(crate) fn is_background(&self) -> bool {
        self.place.state().background
    }

    /// Puts the connection under the caps of `rate`.
    pub(crate) fn set_rate(&self, rate: JobRate) {
        self.place.state().rate = Some(rate);
    }

    /// Wire bytes that have left without having been paid for: some packets more than were thought,
    /// and what is sent again because `path` has lost it.
    pub(crate) fn due(&self, path: &quinn::PathStats, header: u64) -> u64 {
        let lost = path.lost_bytes + path.lost_packets * header;
        let left = self.place.state().left;
        self.account().due(lost, left)
    }

    /// `wire` bytes are paid for and on their way to the socket.
    pub(crate) fn paid(&self, wire: u64) {
        self.account().paid += wire;
    }

    /// The next `wire` bytes leave whatever the caps say.
    pub(crate) fn hurry(&self, wire: u64) {
        self.place.state().hurried += wire;
    }

    /// What the controller knows of the path: its pacing rate and what it is thought to carry, in
    /// bytes a second; 0 while that is not known.
    pub(crate) fn rates(&self) -> [u64; 2] {
        match &self.place.state().view {
            Some(view) => {
                [&view.pacing_rate, &view.bandwidth].map(|rate| rate.load(Ordering::Relaxed))
            }
            None => [0; 2],
        }
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::RateLimiter;

    const PACKET: usize = 1400;

    fn paced(bytes_per_s: u64) -> (Arc<Place>, Arc<PathView>) {
        let (place, view) = (Place::new(), Arc::new(PathView::default()));
        view.pacing_rate.store(bytes_per_s, Ordering::Relaxed);
        place.state().view = Some(view.clone());
        (place, view)
    }

    /// Sends packets for `span` with timers that are up to two milliseconds late; returns wire bytes.
    async fn send_for(place: &Place, span: Duration) -> f64 {
        let (began, before) = (Instant::now(), place.state().left);
        while began.elapsed() < span {
            match place.may_leave(Instant::now()) {
                Ok(()) => place.pay(PACKET, 1, 28),
                Err(until) => tokio::time::sleep_until(until + Duration::from_millis(1)).await,
            }
        }
        (place.state().left - before) as f64 / began.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn what_leaves_keeps_to_the_rate_and_late_timers_cost_nothing() {
        let (place, _) = paced(10_000_000);
        let rate = send_for(&place, Duration::from_secs(2)).await * 1400.0 / 1428.0;
        assert!((9_900_000.0..10_100_000.0).contains(&rate), "{rate}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_not_saved_up() {
        let (place, _) = paced(1_000_000);
        tokio::time::advance(Duration::from_secs(60)).await;
        let mut sent = 0.0;
        while place.may_leave(Instant::now()).is_ok() {
            place.pay(1000, 1, 28);
            sent += 1000.0;
        }
        assert!(sent <= 1_000_000.0 * CREDIT_TIME.as_secs_f64() + 2000.0, "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_known_is_not_paced() {
        let place = Place::new();
        place.pay(1_000_000_000, 1, 28);
        assert!(place.may_leave(Instant::now()).is_ok(), "it has no controller of ours");
        let (place, view) = paced(0);
        place.pay(1_000_000_000, 1, 28);
        assert!(place.may_leave(Instant::now()).is_ok(), "it has no rate yet");
        view.pacing_rate.store(1000, Ordering::Relaxed);
        place.pay(1_000_000_000, 1, 28);
        assert!(place.may_leave(Instant::now()).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn the_lowest_cap_holds_to_the_byte_and_the_controller_learns_who_it_was() {
        let limiter = RateLimiter::new();
        let job = limiter.job();
        limiter.set_agent("16M".parse().ok());
        job.set_job("8M".parse().ok());
        let (place, view) = paced(10_000_000);
        place.state().rate = Some(job.clone());
        let rate = send_for(&place, Duration::from_secs(2)).await;
        assert!((990_000.0..1_005_000.0).contains(&rate), "{rate}");
        assert!(view.is_capped.swap(false, Ordering::Relaxed));
        job.set_job(None);
        let rate = send_for(&place, Duration::from_secs(2)).await;
        assert!((1_980_000.0..2_030_000.0).contains(&rate), "{rate}");
        limiter.set_agent(None);
        view.is_capped.store(false, Ordering::Relaxed);
        assert!(send_for(&place, Duration::from_secs(2)).await > 9_000_000.0);
        assert!(!view.is_capped.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn one_cap_over_two_connections_holds_in_sum() {
        let limiter = RateLimiter::new();
        limiter.set_agent("8M".parse().ok());
        let places = [Place::new(), Place::new()];
        places.iter().for_each(|place| place.state().rate = Some(limiter.job()));
        let span = Duration::from_secs(2);
        let (one, two) = tokio::join!(send_for(&places[0], span), send_for(&places[1], span));
        assert!((980_000.0..1_010_000.0).contains(&(one + two)), "{one} + {two}");
        assert!(one.min(two) > 300_000.0, "{one} and {two}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hand_over_does_not_wait_and_is_paid_for_later() {
        let limiter = RateLimiter::new();
        limiter.set_agent("8k".parse().ok());
        let place = Place::new();
        place.state().rate = Some(limiter.job());
        place.pay(PACKET, 1, 28);
        assert!(place.may_leave(Instant::now()).is_err());
        place.state().hurried += 2000;
        place.pay(PACKET, 1, 28);
        assert!(place.may_leave(Instant::now()).is_ok());
        place.pay(PACKET, 1, 28);
        assert!(place.may_leave(Instant::now()).is_err(), "what was hurried has left");
        tokio::time::advance(Duration::from_millis(2 * 1428)).await;
        assert!(
            place.may_leave(Instant::now()).is_err(),
            "3 packets of 1428 bytes, 1000 bytes a second"
        );
        tokio::time::advance(Duration::from_millis(1500)).await;
        assert!(place.may_leave(Instant::now()).is_ok());
    }

    #[test]
    fn what_is_sent_again_or_was_not_thought_of_is_due_once() {
        let mut account = Account::default();
        account.paid += 10_000;
        assert_eq!(account.due(0, 9_000), 0, "1000 bytes wait in QUIC");
        assert_eq!(account.due(0, 10_500), 500, "acknowledgements");
        assert_eq!(account.due(1_500, 10_500), 1_500, "lost, and soon sent again");
        assert_eq!(account.due(1_500, 12_000), 0);
        assert_eq!(account.due(1_500, 12_100), 100);
    }
}
