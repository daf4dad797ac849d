//! A lossy link in memory, for quinn on tokio's paused clock: the lab's model of a WAN, twice; for one
//! pair of ends, or for several that share its rate and its queue.
//!
//! Invariant: everything that happens to a packet follows from the clock and the seed.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use longhaul_bench::link::{Link, Reason, Verdict};
use longhaul_bench::profile::Profile;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::time::{Instant, Sleep};

/// IP and UDP header that every packet has on the link.
pub(crate) const HEADER: u32 = 28;

/// What became of the packets of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) offered: u64,
    pub(crate) offered_bytes: u64,
    /// By the link's own nature.
    pub(crate) lost: u64,
    pub(crate) lost_bytes: u64,
    /// By its full queue.
    pub(crate) dropped: u64,
    pub(crate) delivered_bytes: u64,
}

/// One direction, for all who share it.
struct Way {
    link: Link,
    began: Instant,
}

/// Both directions of a link that any number of flows share.
#[derive(Clone)]
pub(crate) struct Line {
    ways: [Arc<Mutex<Way>>; 2],
}

impl Line {
    pub(crate) fn new(profile: &Profile, seed: u64) -> Self {
        let way = |seed| {
            Arc::new(Mutex::new(Way { link: Link::new(profile, seed), began: Instant::now() }))
        };
        Self { ways: [way(2 * seed), way(2 * seed + 1)] }
    }

    /// Offers a packet of `bytes`, its headers included, there: when it arrives, or why not.
    pub(crate) fn offer_there(&self, bytes: u32) -> Result<Instant, Reason> {
        lock(&self.ways[0]).offer(bytes)
    }

    /// As [`offer_there`](Self::offer_there), in the other direction.
    pub(crate) fn offer_back(&self, bytes: u32) -> Result<Instant, Reason> {
        lock(&self.ways[1]).offer(bytes)
    }

    /// The `nth` pair of ends; none may be asked for twice.
    pub(crate) fn pair(&self, nth: u8) -> (Arc<End>, Arc<End>) {
        let [there, back] = self.ways.each_ref().map(Direction::new);
        let addr = |host: u8| SocketAddr::from(([192, 0, 2, host], 4433));
        let (near, far) = (addr(2 * nth + 1), addr(2 * nth + 2));
        let end = |addr, out, into| {
            let timer = Mutex::new(Box::pin(tokio::time::sleep(Duration::ZERO)));
            Arc::new(End { addr: Mutex::new(addr), out, into, timer })
        };
        (end(near, there.clone(), back.clone()), end(far, back, there))
    }
}

impl Way {
    fn offer(&mut self, bytes: u32) -> Result<Instant, Reason> {
        match self.link.offer(self.began.elapsed(), bytes) {
            Verdict::Deliver(at) => Ok(self.began + at),
            Verdict::Drop(reason) => Err(reason),
        }
    }
}

struct Packet {
    arrival: Instant,
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

/// One direction, for one pair of ends.
struct Direction {
    way: Arc<Mutex<Way>>,
    under_way: VecDeque<Packet>,
    reader: Option<Waker>,
    tally: Tally,
    departures: Vec<(Instant, u64)>,
}

impl Direction {
    fn new(way: &Arc<Mutex<Way>>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            way: way.clone(),
            under_way: VecDeque::new(),
            reader: None,
            tally: Tally::default(),
            departures: Vec::new(),
        }))
    }

    fn send(&mut self, from: SocketAddr, to: SocketAddr, packet: &[u8]) {
        let bytes = packet.len() as u32 + HEADER;
        self.tally.offered += 1;
        self.tally.offered_bytes += u64::from(bytes);
        self.departures.push((Instant::now(), u64::from(bytes)));
        let offered = lock(&self.way).offer(bytes);
        match offered {
            Ok(arrival) => {
                self.tally.delivered_bytes += u64::from(bytes);
                self.under_way.push_back(Packet { arrival, from, to, bytes: packet.to_vec() });
                if let Some(reader) = self.reader.take() {
                    reader.wake();
                }
            }
            Err(Reason::Queue) => self.tally.dropped += 1,
            Err(Reason::Loss | Reason::Cut) => {
                self.tally.lost += 1;
                self.tally.lost_bytes += u64::from(bytes);
            }
        }
    }
}

/// One end of the link.
pub(crate) struct End {
    addr: Mutex<SocketAddr>,
    out: Arc<Mutex<Direction>>,
    into: Arc<Mutex<Direction>>,
    timer: Mutex<Pin<Box<Sleep>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl End {
    pub(crate) fn addr(&self) -> SocketAddr {
        *lock(&self.addr)
    }

    /// Gives this end another address, without a word to whoever uses it, as a NAT or an uplink does.
    /// What is on its way to the old one is lost.
    pub(crate) fn move_to(&self, addr: SocketAddr) {
        *lock(&self.addr) = addr;
    }

    /// Loses everything in both directions from now on.
    pub(crate) fn cut(&self) {
        for direction in [&self.out, &self.into] {
            lock(&lock(direction).way).link.cut();
        }
    }

    /// Ends a cut.
    pub(crate) fn restore(&self) {
        for direction in [&self.out, &self.into] {
            lock(&lock(direction).way).link.restore();
        }
    }

    /// Gives the direction from this end another rate.
    pub(crate) fn set_rate_mbit(&self, mbit: u64) {
        lock(&lock(&self.out).way).link.set_rate(mbit * 1_000_000);
    }

    /// Time since the link began.
    pub(crate) fn age(&self) -> Duration {
        lock(&lock(&self.out).way).began.elapsed()
    }

    /// When this end sent how many bytes, headers included.
    pub(crate) fn departures(&self) -> Vec<(Instant, u64)> {
        lock(&self.out).departures.clone()
    }

    /// What became of the packets that this end sent.
    pub(crate) fn sent(&self) -> Tally {
        lock(&self.out).tally
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("addr", &self.addr()).finish_non_exhaustive()
    }
}

/// The link's own queue drops packets; the socket itself always takes them.
#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for End {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        lock(&self.out).send(self.addr(), transmit.destination, transmit.contents);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut into = lock(&self.into);
        let now = Instant::now();
        let mut received = 0;
        while received < bufs.len().min(meta.len()) {
            if into.under_way.front().is_none_or(|packet| packet.arrival > now) {
                break;
            }
            let Some(Packet { from, to, bytes, .. }) = into.under_way.pop_front() else { break };
            if to != self.addr() {
                continue;
            }
            bufs[received][..bytes.len()].copy_from_slice(&bytes);
            meta[received] = RecvMeta {
                addr: from,
                len: bytes.len(),
                stride: bytes.len(),
                ..RecvMeta::default()
            };
            received += 1;
        }
        if received > 0 {
            return Poll::Ready(Ok(received));
        }
        into.reader = Some(cx.waker().clone());
        if let Some(&Packet { arrival, .. }) = into.under_way.front() {
            let mut timer = lock(&self.timer);
            timer.as_mut().reset(arrival);
            // Ready only if the clock has moved on since: poll again then.
            if timer.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr())
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
