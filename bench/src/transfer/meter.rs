//! What an end of a flow counts: payload, bytes on the wire, CPU time, and what had arrived when.
//!
//! Invariant: moments are of the host's monotonic clock, so those of the two ends can be compared.

use std::io::{BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use rustix::time::{ClockId, clock_gettime};

use super::{Bound, Order, Received, Sample, Sent, account};
use crate::netns;

/// How often a receiver notes what has arrived.
pub(super) const SAMPLE_PERIOD: Duration = Duration::from_millis(20);
/// How often a wait looks whether it is over.
pub(super) const LOOK_PERIOD: Duration = Duration::from_millis(10);
/// What was offered in time must have arrived this long after, or the rest is dropped: slow senders
/// with large buffers would take minutes.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// Microseconds of the monotonic clock.
pub(super) fn now_us() -> u64 {
    us(clock_gettime(ClockId::Monotonic))
}

fn us(time: rustix::time::Timespec) -> u64 {
    u64::try_from(Duration::try_from(time).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

/// CPU seconds of this process and of the children that it has waited for.
pub(super) fn cpu_s() -> f64 {
    us(clock_gettime(ClockId::ProcessCPUTime)) as f64 / 1e6 + children_cpu_s().unwrap_or(0.0)
}

/// proc(5): after the name in brackets `cutime` and `cstime` are the fields 14 and 15, in ticks.
fn children_cpu_s() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields = stat.rsplit_once(')')?.1.split_whitespace().skip(13).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// IP bytes that this namespace's device has received (`/proc/net/dev`: the first column).
fn device_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(netns::DEVICE))?;
    line.strip_prefix(':')?.split_whitespace().next()?.parse().ok()
}

/// Bytes that no tool can make smaller, the same in every process.
pub(super) fn payload_block(bytes: usize) -> Bytes {
    let mut block = vec![0; bytes];
    Xoshiro256PlusPlus::seed_from_u64(1).fill_bytes(&mut block);
    block.into()
}

/// Says when the lab wants an end to come to its end: its standard input closed.
#[derive(Debug, Clone)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Returns once it is set.
    pub(super) async fn wait(&self) {
        while !self.is_set() {
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    }
}

/// Reads the order of this end, and watches the rest of standard input from then on.
pub(super) fn take_order() -> Result<(Order, Stop)> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("while reading an order")?;
    let order = serde_json::from_str(&line).context("the first line of input is no order")?;
    let stop = Stop(Arc::default());
    let set = stop.0.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        set.store(true, Ordering::SeqCst);
    });
    Ok((order, stop))
}

/// What there is to send; senders side by side take pieces of it.
#[derive(Debug)]
pub(super) struct Supply {
    bound: Bound,
    is_drained: bool,
    stop: Stop,
    began_us: AtomicU64,
    cpu_us: AtomicU64,
    offered: AtomicU64,
    ended_us: AtomicU64,
}

impl Supply {
    pub(super) fn new(order: &Order, stop: Stop) -> Self {
        Self {
            bound: order.bound,
            is_drained: order.is_drained,
            stop,
            began_us: AtomicU64::new(0),
            cpu_us: AtomicU64::new(0),
            offered: AtomicU64::new(0),
            ended_us: AtomicU64::new(0),
        }
    }

    /// Now the connection is there, and the first byte is offered.
    pub(super) fn begin(&self) {
        self.cpu_us.store((cpu_s() * 1e6) as u64, Ordering::SeqCst);
        self.began_us.store(now_us(), Ordering::SeqCst);
    }

    /// Up to `most` bytes to send; 0 once there is nothing more to offer.
    pub(super) fn take(&self, most: usize) -> usize {
        let took = if self.stop.is_set() || self.is_late() {
            0
        } else {
            let most = most as u64;
            let Bound::Bytes(all) = self.bound else { return self.count(most) };
            let take = |offered: u64| (offered < all).then(|| (offered + most).min(all));
            match self.offered.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
                Ok(before) => (all - before).min(most) as usize,
                Err(_) => 0,
            }
        };
        if took == 0 {
            let _ = self.ended_us.compare_exchange(0, now_us(), Ordering::SeqCst, Ordering::SeqCst);
        }
        took
    }

    fn count(&self, bytes: u64) -> usize {
        self.offered.fetch_add(bytes, Ordering::SeqCst);
        bytes as usize
    }

    /// Counts what a tool offers by itself.
    pub(super) fn offer_all(&self, bytes: u64) {
        self.count(bytes);
    }

    /// Whether the time to offer is over.
    pub(super) fn is_late(&self) -> bool {
        self.is_over_since(Duration::ZERO)
    }

    fn is_over_since(&self, more: Duration) -> bool {
        let Bound::Seconds(seconds) = self.bound else { return false };
        let end = Duration::from_secs_f64(seconds) + more;
        now_us() >= self.began_us.load(Ordering::SeqCst) + end.as_micros() as u64
    }

    /// Whether what was offered and has not arrived is given up.
    pub(super) fn is_cut_short(&self) -> bool {
        let grace = if self.is_drained { DRAIN_MAX } else { Duration::ZERO };
        self.stop.is_set() || self.is_over_since(grace)
    }

    /// Returns once it is.
    pub(super) async fn cut_short(&self) {
        while !self.is_cut_short() {
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    }

    /// What was sent, at the end.
    pub(super) fn sent(&self, repeated_packets: Option<u64>) -> Sent {
        let ended_us = match self.ended_us.load(Ordering::SeqCst) {
            0 => now_us(),
            ended_us => ended_us,
        };
        Sent {
            began_us: self.began_us.load(Ordering::SeqCst),
            ended_us,
            offered_bytes: self.offered.load(Ordering::SeqCst),
            repeated_packets,
            cpu_s: cpu_s() - self.cpu_us.load(Ordering::SeqCst) as f64 / 1e6,
        }
    }
}

/// What a receiver counts while it receives.
#[derive(Debug, Default)]
pub(super) struct Meter {
    cpu_us: AtomicU64,
    payload: AtomicU64,
    last_us: AtomicU64,
    /// IP bytes, where the tool counts them; else they follow from the payload.
    wire: AtomicU64,
}

impl Meter {
    /// Now the connection is there.
    pub(super) fn begin(&self) {
        self.cpu_us.store((cpu_s() * 1e6) as u64, Ordering::SeqCst);
    }

    /// Counts payload that just arrived.
    pub(super) fn add(&self, bytes: usize) {
        self.payload.fetch_add(bytes as u64, Ordering::SeqCst);
        self.last_us.fetch_max(now_us(), Ordering::SeqCst);
    }

    /// Says how much payload has arrived in all.
    pub(super) fn set_payload(&self, bytes: u64) {
        if self.payload.swap(bytes, Ordering::SeqCst) != bytes {
            self.last_us.store(now_us(), Ordering::SeqCst);
        }
    }

    /// Says how many IP bytes have arrived in all.
    pub(super) fn set_wire(&self, bytes: u64) {
        self.wire.store(bytes, Ordering::SeqCst);
    }

    fn sample(&self, mtu: u16) -> Sample {
        let flow_bytes = match self.wire.load(Ordering::SeqCst) {
            0 => account::tcp_wire_bytes(self.payload.load(Ordering::SeqCst), mtu),
            wire => wire,
        };
        Sample { at_us: now_us(), flow_bytes, device_bytes: device_bytes().unwrap_or(0) }
    }
}

/// Samples a meter until it is asked for what it saw.
pub(super) struct Sampler {
    meter: Arc<Meter>,
    is_over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<Sample>>,
}

impl Sampler {
    pub(super) fn start(meter: Arc<Meter>, mtu: u16) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (meter, is_over) = (meter.clone(), is_over.clone());
            move || {
                let mut samples = vec![meter.sample(mtu)];
                while !is_over.load(Ordering::SeqCst) {
                    std::thread::sleep(SAMPLE_PERIOD);
                    samples.push(meter.sample(mtu));
                }
                samples
            }
        });
        Self { meter, is_over, thread }
    }

    /// What was received, at the end.
    pub(super) fn finish(self) -> Received {
        let cpu_s = cpu_s() - self.meter.cpu_us.load(Ordering::SeqCst) as f64 / 1e6;
        self.is_over.store(true, Ordering::SeqCst);
        Received {
            last_us: self.meter.last_us.load(Ordering::SeqCst),
            payload_bytes: self.meter.payload.load(Ordering::SeqCst),
            cpu_s,
            // A panic of the thread was printed by itself.
            samples: self.thread.join().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Side;
    use crate::transfer::Tool;

    fn supply(bound: Bound) -> Supply {
        let order = Order {
            caps: crate::transfer::caps::Caps::default(),
            side: Side::A,
            tool: Tool::Longhaul,
            bound,
            is_drained: false,
            port: 0,
            folder: "/".into(),
            mtu: 1500,
        };
        Supply::new(&order, Stop(Arc::default()))
    }

    #[test]
    fn a_supply_gives_its_bytes_once() {
        let supply = supply(Bound::Bytes(10));
        supply.begin();
        assert_eq!([supply.take(4), supply.take(4), supply.take(4), supply.take(4)], [4, 4, 2, 0]);
        assert!(!supply.is_cut_short());
        let sent = supply.sent(None);
        assert_eq!(sent.offered_bytes, 10);
        assert!(sent.ended_us >= sent.began_us);
    }

    #[test]
    fn a_supply_is_over_when_its_time_is_or_when_it_is_told() {
        let over = supply(Bound::Seconds(0.0));
        over.begin();
        assert_eq!((over.take(4), over.is_cut_short()), (0, true));
        let told = supply(Bound::Bytes(10));
        told.stop.0.store(true, Ordering::SeqCst);
        assert_eq!((told.take(4), told.is_cut_short()), (0, true));
    }

    #[test]
    fn a_meter_counts_what_it_is_told() {
        let meter = Meter::default();
        meter.add(1448);
        assert_eq!(meter.sample(1500).flow_bytes, 1500);
        meter.set_wire(1600);
        assert_eq!(meter.sample(1500).flow_bytes, 1600);
        let before = meter.last_us.load(Ordering::SeqCst);
        meter.set_payload(1448);
        assert_eq!(meter.last_us.load(Ordering::SeqCst), before, "nothing came");
    }
}
