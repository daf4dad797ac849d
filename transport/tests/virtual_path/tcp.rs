//! A TCP flow with endless data as a rival on the virtual link: what leaves when, and what came of it.
//!
//! Invariant: a flow sends no more than its [`Control`] lets it, and learns of a packet's fate only from
//! an acknowledgement that has crossed the link.
//!
//! The link keeps packets in order, so an acknowledgement of one says of all before it whether they
//! arrived, as SACK would. What is lost is sent again as a packet like any other: since none is sent
//! twice for nothing, what was delivered is goodput. Left out: the handshake, the receiver's window,
//! the three packets by which TCP waits for reordering, and the probe of the tail.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::link::Line;

/// A full packet and a bare acknowledgement, with IP and TCP headers and timestamps.
pub(crate) const PACKET: u32 = 1500;
const ACK: u32 = 52;
/// What a paced sender may catch up on: timers are in milliseconds.
const CREDIT: Duration = Duration::from_millis(2);
/// Silence beyond the round trip after which everything in flight counts as lost.
const TIMEOUT: Duration = Duration::from_millis(200);

/// What an acknowledgement has shown. Counts are packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ack {
    pub(crate) now: Instant,
    pub(crate) rtt: Duration,
    pub(crate) acked: u64,
    pub(crate) lost: u64,
    /// Still in flight.
    pub(crate) in_flight: u64,
    /// All that was delivered so far, and that had been when the newest acknowledged packet left.
    pub(crate) delivered: u64,
    pub(crate) prior_delivered: u64,
    /// Packets a second between these two.
    pub(crate) rate: f64,
    /// Number of the newest packet that is acknowledged, and of the next to be sent.
    pub(crate) newest: u64,
    pub(crate) next: u64,
}

/// How a flow decides what may leave.
pub(crate) trait Control: Send + 'static {
    fn on_ack(&mut self, ack: &Ack);
    fn on_timeout(&mut self);
    /// Packets that may be in flight.
    fn window(&self) -> u64;
    /// Packets a second that may leave; none: as acknowledgements come.
    fn pacing_rate(&self) -> Option<f64>;
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    arrives: bool,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
}

struct Flow<C> {
    line: Line,
    control: C,
    in_flight: VecDeque<Sent>,
    /// Number of the oldest packet in flight.
    oldest: u64,
    /// Packets on their way, and acknowledgements on theirs: when they arrive, and of which packet.
    packets: VecDeque<(Instant, u64)>,
    acks: VecDeque<(Instant, u64)>,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    next_send: Instant,
    rtt: Duration,
    heard: Instant,
    total: Arc<AtomicU64>,
}

impl<C: Control> Flow<C> {
    async fn run(mut self) {
        loop {
            let now = Instant::now();
            self.receive(now);
            self.take_acks(now);
            let timeout = self.heard + self.rtt + TIMEOUT;
            if now >= timeout {
                self.oldest += self.in_flight.len() as u64;
                self.in_flight.clear();
                self.control.on_timeout();
                self.heard = now;
            }
            self.send(now);
            let room = (self.in_flight.len() as u64) < self.control.window();
            let fronts = [self.packets.front(), self.acks.front()];
            let next = fronts.into_iter().flatten().map(|&(at, _)| at);
            let next = next.chain(room.then_some(self.next_send)).min();
            let until = next.unwrap_or(timeout).min(self.heard + self.rtt + TIMEOUT);
            tokio::time::sleep_until(until).await;
        }
    }

    /// The receiver: acknowledges every second packet, and the last of those that came together.
    fn receive(&mut self, now: Instant) {
        let mut unacknowledged = 0;
        while let Some(&(_, number)) = self.packets.front().filter(|(at, _)| *at <= now) {
            self.packets.pop_front();
            unacknowledged += 1;
            let more = self.packets.front().is_some_and(|(at, _)| *at <= now);
            if unacknowledged == 2 || !more {
                unacknowledged = 0;
                if let Ok(at) = self.line.offer_back(ACK) {
                    self.acks.push_back((at, number));
                }
            }
        }
    }

    fn take_acks(&mut self, now: Instant) {
        while let Some(&(at, newest)) = self.acks.front().filter(|(at, _)| *at <= now) {
            self.acks.pop_front();
            let (mut acked, mut lost, mut last) = (0, 0, None);
            while self.oldest <= newest {
                let Some(sent) = self.in_flight.pop_front() else { break };
                self.oldest += 1;
                if sent.arrives {
                    (acked, last) = (acked + 1, Some(sent));
                } else {
                    lost += 1;
                }
            }
            let Some(sent) = last else { continue };
            self.delivered += acked;
            self.total.fetch_add(acked * u64::from(PACKET), Ordering::Relaxed);
            (self.delivered_at, self.first_sent, self.heard) = (at, sent.at, now);
            self.rtt = at - sent.at;
            let span = (sent.at - sent.first_sent).max(at - sent.delivered_at);
            self.control.on_ack(&Ack {
                now: at,
                rtt: self.rtt,
                acked,
                lost,
                in_flight: self.in_flight.len() as u64,
                delivered: self.delivered,
                prior_delivered: sent.delivered,
                rate: (self.delivered - sent.delivered) as f64 / span.as_secs_f64().max(1e-6),
                newest,
                next: self.oldest + self.in_flight.len() as u64,
            });
            self.send(now);
        }
    }

    fn send(&mut self, now: Instant) {
        while (self.in_flight.len() as u64) < self.control.window() {
            if let Some(rate) = self.control.pacing_rate() {
                if self.next_send > now {
                    return;
                }
                let from = self.next_send.max(now - CREDIT);
                self.next_send = from + Duration::from_secs_f64(1.0 / rate);
            }
            if self.in_flight.is_empty() {
                (self.delivered_at, self.first_sent, self.heard) = (now, now, now);
            }
            let number = self.oldest + self.in_flight.len() as u64;
            let arrival = self.line.offer_there(PACKET);
            self.in_flight.push_back(Sent {
                at: now,
                arrives: arrival.is_ok(),
                delivered: self.delivered,
                delivered_at: self.delivered_at,
                first_sent: self.first_sent,
            });
            self.packets.extend(arrival.ok().map(|at| (at, number)));
        }
    }
}

/// A flow under way; it ends when this is dropped.
pub(crate) struct Tcp {
    task: JoinHandle<()>,
    total: Arc<AtomicU64>,
}

impl Tcp {
    pub(crate) fn start(line: &Line, control: impl Control) -> Self {
        let (total, now) = (Arc::<AtomicU64>::default(), Instant::now());
        let flow = Flow {
            line: line.clone(),
            control,
            in_flight: VecDeque::new(),
            oldest: 0,
            packets: VecDeque::new(),
            acks: VecDeque::new(),
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            next_send: now,
            rtt: Duration::from_secs(1),
            heard: now,
            total: total.clone(),
        };
        Self { task: tokio::spawn(flow.run()), total }
    }

    /// Bytes delivered so far, headers included.
    pub(crate) fn delivered_bytes(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.task.abort();
    }
}
