//! A lossy link in memory, for quinn on tokio's paused clock.
//!
//! Invariant: everything that happens to a packet follows from the clock and the seed. Each
//! direction is a list of stages: tail-drop queue, serialisation at the rate, random loss, delay.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use longhaul_transport::BitRate;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, Sleep};

/// IP and UDP header that every packet has on the link.
const HEADER: u64 = 28;

/// What a link is like; the same both ways.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    pub(crate) rate: BitRate,
    /// Without queue.
    pub(crate) rtt: Duration,
    /// Packets lost at random, per million.
    pub(crate) loss_ppm: u32,
    /// Bytes that may wait at the bottleneck.
    pub(crate) queue: u64,
}

impl Path {
    /// A path with a queue of one bandwidth-delay product.
    pub(crate) fn new(rate: &str, rtt_ms: u64, loss_ppm: u32) -> Self {
        let rate: BitRate = rate.parse().unwrap();
        let rtt = Duration::from_millis(rtt_ms);
        Self { rate, rtt, loss_ppm, queue: rate.bytes_in(rtt) }
    }
}

/// What became of the packets of one direction.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) offered: u64,
    pub(crate) lost: u64,
    pub(crate) dropped: u64,
}

struct Direction {
    path: Path,
    rng: StdRng,
    /// When the bottleneck has sent all that waits.
    free_at: Instant,
    under_way: VecDeque<(Instant, Vec<u8>)>,
    reader: Option<Waker>,
    cut: bool,
    tally: Tally,
}

impl Direction {
    fn new(path: Path, seed: u64) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            path,
            rng: StdRng::seed_from_u64(seed),
            free_at: Instant::now(),
            under_way: VecDeque::new(),
            reader: None,
            cut: false,
            tally: Tally::default(),
        }))
    }

    fn send(&mut self, packet: &[u8]) {
        self.tally.offered += 1;
        if self.cut {
            self.tally.lost += 1;
            return;
        }
        let now = Instant::now();
        let bytes = packet.len() as u64 + HEADER;
        let waiting = self.path.rate.bytes_in(self.free_at.saturating_duration_since(now));
        if waiting + bytes > self.path.queue {
            self.tally.dropped += 1;
            return;
        }
        self.free_at = self.free_at.max(now) + self.path.rate.time_for(bytes);
        if self.rng.random_range(0..1_000_000) < self.path.loss_ppm {
            self.tally.lost += 1;
            return;
        }
        let arrival = self.free_at + self.path.rtt / 2;
        self.under_way.push_back((arrival, packet.to_vec()));
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// One end of the link.
pub(crate) struct End {
    addr: SocketAddr,
    peer: SocketAddr,
    out: Arc<Mutex<Direction>>,
    into: Arc<Mutex<Direction>>,
    timer: Mutex<Pin<Box<Sleep>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// Two ends of one link.
pub(crate) fn pair(path: Path, seed: u64) -> (Arc<End>, Arc<End>) {
    let (there, back) = (Direction::new(path, seed), Direction::new(path, seed + 1));
    let addr = |host: u8| SocketAddr::from(([192, 0, 2, host], 4433));
    let end = |addr, peer, out, into| {
        let timer = Mutex::new(Box::pin(tokio::time::sleep(Duration::ZERO)));
        Arc::new(End { addr, peer, out, into, timer })
    };
    (end(addr(1), addr(2), there.clone(), back.clone()), end(addr(2), addr(1), back, there))
}

impl End {
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Loses everything in both directions from now on.
    pub(crate) fn cut(&self) {
        lock(&self.out).cut = true;
        lock(&self.into).cut = true;
    }

    /// Gives the direction from this end another rate.
    pub(crate) fn set_rate(&self, rate: &str) {
        lock(&self.out).path.rate = rate.parse().unwrap();
    }

    /// What became of the packets that this end sent.
    pub(crate) fn sent(&self) -> Tally {
        lock(&self.out).tally
    }
}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("End").field("addr", &self.addr).finish_non_exhaustive()
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
        let mut out = lock(&self.out);
        if transmit.destination == self.peer {
            out.send(transmit.contents);
        }
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
            if into.under_way.front().is_none_or(|(arrival, _)| *arrival > now) {
                break;
            }
            let Some((_, packet)) = into.under_way.pop_front() else { break };
            bufs[received][..packet.len()].copy_from_slice(&packet);
            meta[received] = RecvMeta {
                addr: self.peer,
                len: packet.len(),
                stride: packet.len(),
                ..RecvMeta::default()
            };
            received += 1;
        }
        if received > 0 {
            return Poll::Ready(Ok(received));
        }
        into.reader = Some(cx.waker().clone());
        if let Some(&(arrival, _)) = into.under_way.front() {
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
        Ok(self.addr)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
