//! What the links to each peer have carried and cost in the life of this agent.
//!
//! Invariant: a count never goes back: what a session has counted goes over to the past of its peer
//! in the moment in which the session leaves the living. Looking at sessions keeps none alive.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longhaul_transport::{Class, ClassBytes, PathStats, Session, SessionView};

/// Peers that are counted by name, first come first served; the rest is counted together, so that
/// what is exported has an end.
const NAMED_MAX: usize = 128;
/// The name of the rest. No peer can have it.
pub(crate) const OTHERS: &str = "(others)";

/// All links of this agent.
#[derive(Debug, Default)]
pub struct Links {
    peers: Mutex<BTreeMap<String, Peer>>,
}

#[derive(Debug, Default)]
struct Peer {
    /// Sessions so far, those that live included.
    sessions: u64,
    past: Carried,
    living: BTreeMap<u64, SessionView>,
}

/// What sessions have carried and cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Carried {
    pub(crate) wire_bytes_sent: u64,
    pub(crate) wire_bytes_received: u64,
    pub(crate) sent_packets: u64,
    pub(crate) lost_packets: u64,
    pub(crate) lost_bytes: u64,
    pub(crate) reconnects: u64,
    /// Index with [`Class::index`].
    pub(crate) classes: [ClassBytes; Class::ALL.len()],
}

/// The path to a peer now, over all sessions with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Path {
    /// The longest smoothed round trip.
    pub(crate) rtt: Duration,
    /// The lowest one seen.
    pub(crate) min_rtt: Duration,
    /// The longest wait beyond a session's lowest round trip.
    pub(crate) queueing: Duration,
    /// Bytes that may be under way, in sum.
    pub(crate) window: u64,
    /// Bytes a second at which packets leave at most, in sum.
    pub(crate) pacing: u64,
    /// Bytes a second that the path is thought to deliver, in sum.
    pub(crate) bandwidth: u64,
    /// Connections that carry them, in sum: more than one a session where a core is the limit.
    pub(crate) connections: u32,
    /// For how long the link has been down; zero if it is up.
    pub(crate) down: Duration,
}

/// What is known of the links to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerLinks {
    pub(crate) peer: String,
    pub(crate) living: usize,
    pub(crate) sessions: u64,
    pub(crate) carried: Carried,
    /// Nothing while there is no session.
    pub(crate) path: Option<Path>,
}

impl Links {
    /// Counts what `session` with `peer` carries, until it ends.
    pub(crate) fn count(self: &Arc<Self>, peer: &str, session: &Session) {
        let view = session.view();
        let (peer, number) = {
            let mut peers = self.peers();
            let has_room = peers.len() < NAMED_MAX || peers.contains_key(peer);
            let name = if has_room { peer } else { OTHERS };
            let known = peers.entry(name.to_owned()).or_default();
            known.sessions += 1;
            known.living.insert(known.sessions, view.clone());
            (name.to_owned(), known.sessions)
        };
        let links = Arc::clone(self);
        tokio::spawn(async move {
            view.closed().await;
            if let Some(known) = links.peers().get_mut(&peer)
                && let Some(ended) = known.living.remove(&number)
            {
                known.past.add(&ended.stats());
            }
        });
    }

    /// What is known now, by peer; those without a session so far are not in it.
    pub(crate) fn all(&self) -> Vec<PeerLinks> {
        self.peers().iter().map(|(name, peer)| peer.known(name)).collect()
    }

    fn peers(&self) -> MutexGuard<'_, BTreeMap<String, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    fn known(&self, name: &str) -> PeerLinks {
        let mut carried = self.past;
        let mut path: Option<Path> = None;
        for view in self.living.values() {
            let stats = view.stats();
            carried.add(&stats);
            let one = Path::of(&stats, view.down_for().unwrap_or_default());
            path = Some(path.map_or(one, |path| path.beside(one)));
        }
        PeerLinks {
            peer: name.to_owned(),
            living: self.living.len(),
            sessions: self.sessions,
            carried,
            path,
        }
    }
}

impl Carried {
    fn add(&mut self, stats: &PathStats) {
        self.wire_bytes_sent += stats.wire_bytes_sent;
        self.wire_bytes_received += stats.wire_bytes_received;
        self.sent_packets += stats.sent_packets;
        self.lost_packets += stats.lost_packets;
        self.lost_bytes += stats.lost_bytes;
        self.reconnects += stats.reconnects;
        for (sum, bytes) in self.classes.iter_mut().zip(stats.classes) {
            *sum += bytes;
        }
    }
}

impl Path {
    fn of(stats: &PathStats, down: Duration) -> Self {
        Self {
            rtt: stats.rtt,
            min_rtt: stats.min_rtt,
            queueing: stats.rtt.saturating_sub(stats.min_rtt),
            window: stats.cwnd,
            pacing: stats.pacing_rate,
            bandwidth: stats.bandwidth,
            connections: stats.connections,
            down,
        }
    }

    /// Both at the same time: what they may send adds up, and the worse of them is what to look at.
    fn beside(self, other: Self) -> Self {
        Self {
            rtt: self.rtt.max(other.rtt),
            min_rtt: self.min_rtt.min(other.min_rtt),
            queueing: self.queueing.max(other.queueing),
            window: self.window.saturating_add(other.window),
            pacing: self.pacing.saturating_add(other.pacing),
            bandwidth: self.bandwidth.saturating_add(other.bandwidth),
            connections: self.connections.saturating_add(other.connections),
            down: self.down.max(other.down),
        }
    }
}
