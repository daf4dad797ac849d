//! The source's end of one attempt: sends items, and sorts what the target says to who waits for it.
//!
//! Invariant: whoever waits on the link is woken when it is lost or the target gives up; nothing in
//! here waits for a peer without that way out.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{Class, CloseReason, ControlReceiver, ControlSender, PathStats, Session};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;

use super::error::MigrationError;
use super::message::{BulkHeader, ToSource, ToTarget};
use super::meter::RecentRate;
use super::report::{ClassReport, LinkReport};

/// Answers of the target that nobody has read yet; more is a protocol error of the peer's.
const REPLIES_MAX: usize = 64;
/// Answers about disks that nobody has read yet: no more questions than this are ever outstanding.
const WANTS_MAX: usize = 256;

/// A round trip below this is noise: everything is one machine.
const MIN_RTT_S: f64 = 0.001;
/// The share of what a path delivers that is payload: the rest is headers, seals and repetitions.
const PAYLOAD_SHARE: f64 = 0.95;
/// Where nobody has a model of the path: the share of window / round trip that arrives. The window has
/// room for a probe, and packets for overhead.
const CARRIED_SHARE: f64 = 0.8;

/// How the link stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    Good,
    Cut(String),
    PeerFailed(String),
}

/// Counters that the target reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Applied {
    /// Last round that is written in full.
    pub(super) round: u32,
    /// Memory items applied.
    pub(super) memory_items: u64,
}

/// The source's end.
pub(super) struct Link {
    peer: String,
    session: Session,
    control: Mutex<ControlSender>,
    replies: Mutex<mpsc::Receiver<ToSource>>,
    wants: Mutex<mpsc::Receiver<ToSource>>,
    unproven: Mutex<mpsc::Receiver<u64>>,
    applied: watch::Receiver<Applied>,
    health: watch::Receiver<Health>,
    rounds: AtomicU32,
    disk_items: AtomicU64,
    memory_items: AtomicU64,
    /// Index with [`Class::index`].
    goodput: std::sync::Mutex<[RecentRate; Class::ALL.len()]>,
    reader: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Link {
    /// Takes the control stream of a session and starts to read it.
    pub(super) fn new(peer: &str, session: Session) -> Result<Self, MigrationError> {
        let (control, receiver) = session
            .control()
            .ok_or_else(|| MigrationError::cut(peer, "its control stream is in use"))?;
        let (replies_in, replies) = mpsc::channel(REPLIES_MAX);
        let (wants_in, wants) = mpsc::channel(WANTS_MAX);
        // The target waits for the answer before it can ask again.
        let (unproven_in, unproven) = mpsc::channel(1);
        let (applied_in, applied) = watch::channel(Applied::default());
        let (health_in, health) = watch::channel(Health::Good);
        let reader = tokio::spawn(async move {
            let end = sort(receiver, replies_in, wants_in, unproven_in, applied_in).await;
            health_in.send_replace(end);
        });
        Ok(Self {
            peer: peer.to_owned(),
            session,
            control: Mutex::new(control),
            replies: Mutex::new(replies),
            wants: Mutex::new(wants),
            unproven: Mutex::new(unproven),
            applied,
            health,
            rounds: AtomicU32::new(0),
            disk_items: AtomicU64::new(0),
            memory_items: AtomicU64::new(0),
            goodput: std::sync::Mutex::default(),
            reader,
        })
    }

    /// Waits for a link that is down for up to `patience` from now on, instead of calling it lost.
    pub(super) fn set_patience(&self, patience: Duration) {
        self.session.set_patience(patience);
    }

    /// For how long the link has been down, if it is.
    pub(super) fn down_for(&self) -> Option<Duration> {
        self.session.down_for()
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn stats(&self) -> PathStats {
        self.session.stats()
    }

    /// What the path carries, in bytes a second, by the congestion controller's model of it.
    pub(super) fn bytes_per_s(&self) -> f64 {
        let path = self.session.stats();
        if path.bandwidth > 0 {
            return path.bandwidth as f64 * PAYLOAD_SHARE;
        }
        path.cwnd as f64 / path.rtt.as_secs_f64().max(MIN_RTT_S) * CARRIED_SHARE
    }

    /// What the link has carried and cost in the `at_ms` milliseconds since the start.
    pub(super) fn report(&self, at_ms: u64) -> LinkReport {
        let path = self.session.stats();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let classes = Class::ALL.into_iter().zip(path.classes).rev();
        let mut goodput = self.goodput.lock().unwrap_or_else(PoisonError::into_inner);
        LinkReport {
            wire_bytes_sent: path.wire_bytes_sent,
            wire_bytes_received: path.wire_bytes_received,
            repeated_bytes: path.lost_bytes,
            packets_sent: path.sent_packets,
            packets_lost: path.lost_packets,
            rtt_ms: ms(path.rtt),
            min_rtt_ms: ms(path.min_rtt),
            queueing_ms: ms(path.rtt.saturating_sub(path.min_rtt)),
            window_bytes: path.cwnd,
            pacing_bits_per_s: path.pacing_rate * 8,
            bandwidth_bits_per_s: path.bandwidth * 8,
            background: path.background,
            connections: path.connections,
            reconnects: path.reconnects,
            down_ms: self.down_for().map_or(0, |down| down.as_millis() as u64),
            classes: classes
                .map(|(class, bytes)| ClassReport {
                    class: class.name().to_owned(),
                    sent_bytes: bytes.sent,
                    arrived_bytes: bytes.acked,
                    received_bytes: bytes.received,
                    goodput_bits_per_s: goodput[class.index()].bits_per_s(at_ms, bytes.acked),
                })
                .collect(),
        }
    }

    /// Wire bytes so far, both directions.
    pub(super) fn wire_bytes(&self) -> u64 {
        let stats = self.session.stats();
        stats.wire_bytes_sent + stats.wire_bytes_received
    }

    /// Disk items sent so far.
    pub(super) fn disk_items(&self) -> u64 {
        self.disk_items.load(Ordering::Relaxed)
    }

    /// Memory items sent so far.
    pub(super) fn memory_items(&self) -> u64 {
        self.memory_items.load(Ordering::Relaxed)
    }

    pub(super) fn applied(&self) -> Applied {
        *self.applied.borrow()
    }

    pub(super) async fn tell(&self, message: &ToTarget) -> Result<(), MigrationError> {
        let control = self.control.lock().await;
        control.send(message).await.map_err(MigrationError::sending(&self.peer))
    }

    /// The next answer that is not about items.
    pub(super) async fn reply(&self) -> Result<ToSource, MigrationError> {
        let mut replies = self.replies.lock().await;
        match replies.recv().await {
            Some(reply) => Ok(reply),
            None => Err(self.why_lost().await),
        }
    }

    /// An answer to a question about a disk that is here already.
    pub(super) async fn want_ready(&self) -> Option<ToSource> {
        self.wants.lock().await.try_recv().ok()
    }

    /// The answer to one of the questions about a disk.
    pub(super) async fn want(&self) -> Result<ToSource, MigrationError> {
        let mut wants = self.wants.lock().await;
        match wants.recv().await {
            Some(want) => Ok(want),
            None => Err(self.why_lost().await),
        }
    }

    /// The next memory item of which the target wants the named pages in full. Never, once the link is
    /// lost.
    pub(super) async fn unproven(&self) -> u64 {
        match self.unproven.lock().await.recv().await {
            Some(item) => item,
            None => std::future::pending().await,
        }
    }

    /// The number of the next round of disk items, from 1.
    pub(super) fn next_round(&self) -> u32 {
        self.rounds.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The number of the next disk item; it must be sent.
    pub(super) fn next_disk_item(&self) -> u64 {
        self.disk_items.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of the next memory item; it must be sent.
    pub(super) fn next_memory_item(&self) -> u64 {
        self.memory_items.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a bulk item. Returns once QUIC took the bytes.
    pub(super) async fn send_bulk(
        &self,
        class: Class,
        header: &BulkHeader,
        body: Bytes,
    ) -> Result<(), MigrationError> {
        let sent = self.session.send_batch(class, &header.encode(), vec![body]).await;
        match sent {
            Ok(()) => Ok(()),
            // The reader may know better why.
            Err(error) => match &*self.health.borrow() {
                Health::PeerFailed(reason) => Err(self.peer_failed(reason)),
                _ => Err(MigrationError::cut(&self.peer, error)),
            },
        }
    }

    /// Waits until what the target reports satisfies `enough`.
    pub(super) async fn until(
        &self,
        mut enough: impl FnMut(&Applied) -> bool,
    ) -> Result<Applied, MigrationError> {
        let mut applied = self.applied.clone();
        let now = applied.wait_for(|applied| enough(applied)).await.map(|now| *now);
        match now {
            Ok(now) => Ok(now),
            Err(_) => Err(self.why_lost().await),
        }
    }

    /// Returns, with the reason, once the link is lost or the target gave up.
    pub(super) async fn lost(&self) -> MigrationError {
        self.why_lost().await
    }

    async fn why_lost(&self) -> MigrationError {
        let mut health = self.health.clone();
        let lost = health.wait_for(|health| *health != Health::Good).await;
        match lost.as_deref() {
            Ok(Health::PeerFailed(reason)) => self.peer_failed(reason),
            Ok(Health::Cut(detail)) => MigrationError::cut(&self.peer, detail),
            Ok(Health::Good) | Err(_) => MigrationError::cut(&self.peer, "the session ended"),
        }
    }

    fn peer_failed(&self, reason: &str) -> MigrationError {
        MigrationError::Peer { peer: self.peer.clone(), reason: reason.to_owned() }
    }

    /// Says of an error whether it came of a peer that has forgotten the session.
    pub(super) fn explain(&self, error: MigrationError) -> MigrationError {
        match error {
            MigrationError::Cut { peer, detail, .. } => {
                let forgotten = self.session.close_reason() == Some(CloseReason::Forgotten);
                MigrationError::Cut { peer, detail, forgotten }
            }
            other => other,
        }
    }

    /// Ends the session.
    pub(super) fn close(&self, reason: &str) {
        self.session.close(reason);
    }
}

/// Reads the target's words until they end, and says how.
async fn sort(
    mut receiver: ControlReceiver,
    replies: mpsc::Sender<ToSource>,
    wants: mpsc::Sender<ToSource>,
    unproven: mpsc::Sender<u64>,
    applied: watch::Sender<Applied>,
) -> Health {
    loop {
        let message = match receiver.recv::<ToSource>().await {
            Ok(Some(message)) => message,
            Ok(None) => return Health::Cut("it closed the session".into()),
            Err(error) => return Health::Cut(error.to_string()),
        };
        match message {
            answer @ (ToSource::Want { .. } | ToSource::Lacking { .. }) => {
                if wants.try_send(answer).is_err() {
                    return Health::Cut("it answers offers that were not made".into());
                }
            }
            ToSource::Unproven { item } => {
                if unproven.try_send(item).is_err() {
                    return Health::Cut("it asks for the same pages twice".into());
                }
            }
            ToSource::RoundDone { round } => {
                applied.send_modify(|applied| {
                    applied.round = round;
                });
            }
            ToSource::MemoryApplied { items } => {
                applied.send_modify(|applied| {
                    applied.memory_items = items;
                });
            }
            ToSource::Failed { reason } => return Health::PeerFailed(reason),
            reply => {
                if replies.try_send(reply).is_err() {
                    return Health::Cut("it sends answers that nobody asked for".into());
                }
            }
        }
    }
}
