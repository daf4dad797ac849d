//! Moves packets between the two TUN devices of a WAN through a [`Link`] for each direction.
//!
//! Invariant: a packet leaves at or after the moment that the model named, in order, and every
//! packet that was read is counted exactly once: delivered, dropped with a reason, or under way.
//!
//! One thread a direction. It sleeps in `poll` while nothing moves; while packets move it wakes up
//! every [`GRAIN`] at most and works in batches, because a wake-up for every packet would cost more
//! than the packets. The kernel's device queue holds what arrives in between, and the model is told
//! when that was (see [`Link::offer_noticed`]).

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::link::{Link, Reason, Verdict};
use crate::netns::{self, Side};
use crate::profile::Profile;

/// Shortest sleep while packets move; also the most by which it makes a packet late.
const GRAIN: Duration = Duration::from_micros(150);
/// Packets that are read before due ones are written again.
const BATCH_PACKETS: usize = 128;
/// A direction that was not scheduled for longer than this lost that time for good: the model must
/// not send a stall's worth of packets at once.
const STALL_MAX: Duration = Duration::from_millis(20);
/// Bytes under way in one direction: above every sensible rate x (delay + queue). More is dropped
/// and counted as `overrun`.
const UNDER_WAY_BYTES_MAX: usize = 512 << 20;
/// Packet buffers that are kept for reuse.
const SPARE_BUFFERS_MAX: usize = 1 << 15;
/// A delivery this much after its moment is counted as late.
const LATE: Duration = Duration::from_millis(1);
/// Data threads go before others: a relay that waits for a CPU is another WAN. Needs root, like
/// everything here.
pub(crate) const NICE: i32 = -15;

/// Grain and number of the classes in which waits before the bottleneck are counted: up to 2 s.
const WAIT_GRAIN: Duration = Duration::from_micros(100);
const WAIT_CLASSES: usize = 20_000;
/// How often the kernel's own drop counter is read while packets move.
const DEVICE_COUNT_PERIOD: Duration = Duration::from_millis(500);
/// An addition to an eventfd's counter; any that is not zero wakes, in either byte order.
const WAKE: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// What one direction did so far. Bytes are of whole IP packets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Packets that the sending host put on the wire, those included that were dropped.
    pub sent_packets: u64,
    /// Their bytes: the wire bytes of this direction.
    pub sent_bytes: u64,
    /// Packets that reached the other host.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Packets dropped by the full queue.
    pub dropped_queue: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
    /// Packets that met a cut, or were under way when it came.
    pub dropped_cut: u64,
    /// Packets that the relay itself had to drop, not the model: should be 0.
    pub dropped_overrun: u64,
    /// Bytes of all dropped packets.
    pub dropped_bytes: u64,
    /// Bytes of those lost at random.
    #[serde(default)]
    pub lost_bytes: u64,
    /// How long delivered packets waited before the bottleneck, in microseconds: half of them less.
    #[serde(default)]
    pub queue_us_median: u64,
    /// The same, 95 of 100 less.
    #[serde(default)]
    pub queue_us_p95: u64,
    /// Most bytes that ever waited before the bottleneck.
    pub queue_peak_bytes: u64,
    /// Packets that the host dropped before the relay saw them: should be 0.
    pub device_dropped: u64,
    /// Packets delivered more than 1 ms after their moment.
    pub late_packets: u64,
    /// The latest delivery, in microseconds after its moment.
    pub late_us_max: u64,
}

/// What both directions did so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Seconds since the relay started.
    pub elapsed_s: f64,
    /// CPU seconds that its process used.
    pub cpu_s: f64,
    /// Whether the WAN is cut now.
    pub is_cut: bool,
    /// From side a to side b.
    pub a_to_b: DirectionStats,
    /// From side b to side a.
    pub b_to_a: DirectionStats,
}

impl Stats {
    /// Bytes on the wire in both directions.
    pub fn wire_bytes(&self) -> u64 {
        self.a_to_b.sent_bytes + self.b_to_a.sent_bytes
    }

    /// Those of them that were dropped.
    pub fn dropped_bytes(&self) -> u64 {
        self.a_to_b.dropped_bytes + self.b_to_a.dropped_bytes
    }
}

#[derive(Debug, Default)]
struct Shared {
    is_cut: AtomicBool,
    is_over: AtomicBool,
    directions: [Mutex<DirectionStats>; 2],
    waits: [Waits; 2],
}

/// The running data threads of one WAN.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    wakers: [OwnedFd; 2],
    threads: Vec<std::thread::JoinHandle<()>>,
    started: Instant,
}

impl Relay {
    /// Starts to move packets between the devices of the sides a and b of the WAN `name`.
    ///
    /// # Errors
    ///
    /// When descriptors or threads are exhausted.
    pub fn start(name: &str, profile: &Profile, seed: u64, devices: [OwnedFd; 2]) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let started = Instant::now();
        let new_waker = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let wakers = [new_waker()?, new_waker()?];
        let mut relay = Self { shared, wakers, threads: Vec::new(), started };
        for (index, side) in Side::BOTH.into_iter().enumerate() {
            let direction = Direction {
                input: devices[index].try_clone()?,
                output: devices[1 - index].try_clone()?,
                waker: relay.wakers[index].try_clone()?,
                // Two directions of one seed must not lose the same packets.
                link: Link::new(profile, seed.wrapping_mul(2).wrapping_add(index as u64)),
                shared: Arc::clone(&relay.shared),
                index,
                started,
                looked: Duration::ZERO,
                under_way: VecDeque::new(),
                under_way_bytes: 0,
                spare: Vec::new(),
                mtu: usize::from(profile.mtu),
                device_counted: Duration::ZERO,
                stats: DirectionStats::default(),
            };
            let name = name.to_owned();
            let thread = std::thread::Builder::new()
                .name(format!("wan-{}", side.letter()))
                .spawn(move || {
                    // In the namespace of its input, for the device's own drop counter only.
                    let _ = netns::enter(&name, side);
                    direction.run();
                })
                .context("while starting a data thread of the relay")?;
            relay.threads.push(thread);
        }
        Ok(relay)
    }

    /// Loses every packet from now on, those under way included.
    pub fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.shared.is_cut.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let read = |direction: usize| {
            let stats = &self.shared.directions[direction];
            let stats = stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let waits = self.shared.waits[direction].counts();
            let [queue_us_median, queue_us_p95] = [50, 95].map(|percent| us_at(&waits, percent));
            DirectionStats { queue_us_median, queue_us_p95, ..stats }
        };
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Stats {
            elapsed_s: self.started.elapsed().as_secs_f64(),
            cpu_s: Duration::try_from(cpu).unwrap_or_default().as_secs_f64(),
            is_cut: self.shared.is_cut.load(Ordering::SeqCst),
            a_to_b: read(0),
            b_to_a: read(1),
        }
    }

    fn wake(&self) {
        for waker in &self.wakers {
            // Fails only when the counter is full: then it wakes anyway.
            let _ = rustix::io::write(waker, &WAKE);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.wake();
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed by itself; here it only must not hide another one.
            let _ = thread.join();
        }
    }
}

/// How many packets waited how long, in classes of [`WAIT_GRAIN`]. Without a lock: a data thread must
/// never wait for whoever reads.
#[derive(Debug)]
struct Waits(Box<[AtomicU64]>);

impl Default for Waits {
    fn default() -> Self {
        Self((0..WAIT_CLASSES).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Waits {
    fn count(&self, wait: Duration) {
        let class = (wait.as_nanos() / WAIT_GRAIN.as_nanos()) as usize;
        self.0[class.min(WAIT_CLASSES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> Vec<u64> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

/// What `percent` of all packets waited at most, in microseconds; 0 of none.
fn us_at(counts: &[u64], percent: u64) -> u64 {
    let rank = (counts.iter().sum::<u64>() * percent).div_ceil(100);
    let mut seen = 0;
    let class = counts.iter().position(|count| {
        seen += count;
        seen >= rank
    });
    class.unwrap_or(0) as u64 * WAIT_GRAIN.as_micros() as u64
}

struct Packet {
    due: Duration,
    buffer: Box<[u8]>,
    len: usize,
}

struct Direction {
    input: OwnedFd,
    output: OwnedFd,
    waker: OwnedFd,
    link: Link,
    shared: Arc<Shared>,
    index: usize,
    started: Instant,
    /// When the input was last seen empty, or waited for.
    looked: Duration,
    under_way: VecDeque<Packet>,
    under_way_bytes: usize,
    spare: Vec<Box<[u8]>>,
    mtu: usize,
    device_counted: Duration,
    stats: DirectionStats,
}

impl Direction {
    fn run(mut self) {
        // Without these the relay works, only less exactly; the stats show it as lateness.
        let _ = rustix::process::setpriority_process(None, NICE);
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1_000));
        let mut batch = Vec::with_capacity(BATCH_PACKETS);
        let mut is_cut = false;
        while !self.shared.is_over.load(Ordering::SeqCst) {
            if self.shared.is_cut.load(Ordering::SeqCst) != is_cut {
                is_cut = !is_cut;
                if is_cut { self.cut() } else { self.link.restore() }
            }
            self.read(&mut batch);
            let read = batch.len();
            self.offer(&mut batch);
            self.deliver();
            self.publish();
            if read < BATCH_PACKETS {
                self.wait(read > 0);
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Reads until the device is empty or the batch is full.
    fn read(&mut self, batch: &mut Vec<(Box<[u8]>, usize)>) {
        while batch.len() < BATCH_PACKETS {
            let mut buffer =
                self.spare.pop().unwrap_or_else(|| vec![0; self.mtu].into_boxed_slice());
            match rustix::io::read(&self.input, &mut buffer[..]) {
                Ok(len) => batch.push((buffer, len)),
                Err(error) => {
                    self.keep(buffer);
                    if error != Errno::INTR {
                        return;
                    }
                }
            }
        }
    }

    /// Hands a batch to the model. When exactly each packet came since the last look is unknown:
    /// they are taken to have come evenly.
    fn offer(&mut self, batch: &mut Vec<(Box<[u8]>, usize)>) {
        let now = self.now();
        let since = self.looked.max(now.saturating_sub(STALL_MAX));
        let count = u32::try_from(batch.len()).unwrap_or(u32::MAX).max(1);
        let step = (now - since) / count;
        for (i, (buffer, len)) in (1_u32..).zip(batch.drain(..)) {
            self.stats.sent_packets += 1;
            self.stats.sent_bytes += len as u64;
            let len_u32 = u32::try_from(len).unwrap_or(u32::MAX);
            let verdict = self.link.offer_noticed(since + step * i, now, len_u32);
            let counter = match verdict {
                Verdict::Deliver(due) if self.under_way_bytes + len <= UNDER_WAY_BYTES_MAX => {
                    self.under_way_bytes += len;
                    self.shared.waits[self.index].count(self.link.last_wait());
                    self.under_way.push_back(Packet { due, buffer, len });
                    continue;
                }
                Verdict::Deliver(_) => &mut self.stats.dropped_overrun,
                Verdict::Drop(Reason::Queue) => &mut self.stats.dropped_queue,
                Verdict::Drop(Reason::Loss) => {
                    self.stats.lost_bytes += len as u64;
                    &mut self.stats.dropped_loss
                }
                Verdict::Drop(Reason::Cut) => &mut self.stats.dropped_cut,
            };
            *counter += 1;
            self.stats.dropped_bytes += len as u64;
            self.keep(buffer);
        }
        self.looked = now;
    }

    fn deliver(&mut self) {
        let now = self.now();
        while self.under_way.front().is_some_and(|packet| packet.due <= now) {
            let Some(packet) = self.under_way.pop_front() else { break };
            self.under_way_bytes -= packet.len;
            let late = now - packet.due;
            self.stats.late_packets += u64::from(late > LATE);
            let late_us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
            self.stats.late_us_max = self.stats.late_us_max.max(late_us);
            // The device takes a packet or refuses it at once (it is down, or memory is short).
            if rustix::io::write(&self.output, &packet.buffer[..packet.len]).is_ok() {
                self.stats.delivered_packets += 1;
                self.stats.delivered_bytes += packet.len as u64;
            } else {
                self.stats.dropped_overrun += 1;
                self.stats.dropped_bytes += packet.len as u64;
            }
            self.keep(packet.buffer);
        }
    }

    fn cut(&mut self) {
        self.link.cut();
        while let Some(packet) = self.under_way.pop_front() {
            self.stats.dropped_cut += 1;
            self.stats.dropped_bytes += packet.len as u64;
            self.keep(packet.buffer);
        }
        self.under_way_bytes = 0;
    }

    fn keep(&mut self, buffer: Box<[u8]>) {
        if self.spare.len() < SPARE_BUFFERS_MAX {
            self.spare.push(buffer);
        }
    }

    fn publish(&mut self) {
        self.stats.queue_peak_bytes = self.link.queue_peak_bytes();
        if self.looked >= self.device_counted + DEVICE_COUNT_PERIOD {
            self.device_counted = self.looked;
            self.stats.device_dropped = device_dropped().unwrap_or(self.stats.device_dropped);
        }
        let mut shared =
            self.shared.directions[self.index].lock().unwrap_or_else(PoisonError::into_inner);
        shared.clone_from(&self.stats);
    }

    /// Sleeps until something can be done. `is_busy`: packets came just now, so more will have come
    /// after a grain; there is no need to be woken by the first of them.
    fn wait(&mut self, is_busy: bool) {
        let due_in = self.under_way.front().map(|packet| packet.due.saturating_sub(self.now()));
        let timeout = if is_busy { Some(GRAIN) } else { due_in.map(|due_in| due_in.max(GRAIN)) };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let waker = PollFd::from_borrowed_fd(self.waker.as_fd(), PollFlags::IN);
        let input = PollFd::from_borrowed_fd(self.input.as_fd(), PollFlags::IN);
        let mut fds = [waker, input];
        let watched = if is_busy { &mut fds[..1] } else { &mut fds[..] };
        let _ = poll(watched, timeout.as_ref());
        let woken = !watched[0].revents().is_empty();
        if woken {
            let _ = rustix::io::read(&self.waker, &mut [0_u8; 8]);
        }
        if !is_busy {
            // It waited for the input: whatever is there now came now.
            self.looked = self.now();
        }
    }
}

/// Packets that this namespace's device dropped because nobody read them, from the kernel's
/// counters (`/proc/net/dev`: receive has eight columns, the fourth of transmit is `drop`).
fn device_dropped() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(netns::DEVICE))?;
    line.strip_prefix(':')?.split_whitespace().nth(8 + 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_have_their_median_and_tail() {
        let waits = Waits::default();
        assert_eq!(us_at(&waits.counts(), 50), 0);
        for ms in 1..=100 {
            waits.count(Duration::from_millis(ms));
        }
        let counts = waits.counts();
        assert_eq!((us_at(&counts, 50), us_at(&counts, 95)), (50_000, 95_000));
        waits.count(Duration::from_secs(60));
        assert_eq!(us_at(&waits.counts(), 100), 1_999_900);
    }
}
