//! What a session has cost and carried so far.
//!
//! Invariant: wire bytes are what the link carried, headers and repetitions included; goodput is
//! what the callers gave or got. The two are always reported together.

use std::net::SocketAddr;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::class::Class;
use crate::congestion::carried;
use crate::link::Line;

/// Bytes of an IPv4 and a UDP header, without options (RFC 791, RFC 768).
pub const IPV4_UDP_HEADER: u64 = 20 + 8;
/// Bytes of an IPv6 and a UDP header, without extensions (RFC 8200, RFC 768).
pub const IPV6_UDP_HEADER: u64 = 40 + 8;

/// Bytes of one class, as given to and by the callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassBytes {
    /// Handed to QUIC for sending.
    pub sent: u64,
    /// Of these, known to be with the peer, whole.
    pub acked: u64,
    /// Received as whole batches.
    pub received: u64,
}

impl AddAssign for ClassBytes {
    fn add_assign(&mut self, more: Self) {
        self.sent += more.sent;
        self.acked += more.acked;
        self.received += more.received;
    }
}

/// A snapshot of a session's path and counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathStats {
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Lowest round trip seen on this path.
    pub min_rtt: Duration,
    /// UDP payload sent, plus [`IPV4_UDP_HEADER`] or [`IPV6_UDP_HEADER`] for every datagram.
    /// Link-layer headers are not counted: they differ from hop to hop.
    pub wire_bytes_sent: u64,
    /// UDP payload received, headers as above.
    pub wire_bytes_received: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets taken for lost; their content was sent again.
    pub lost_packets: u64,
    /// Bytes of these packets.
    pub lost_bytes: u64,
    /// Congestion window, bytes.
    pub cwnd: u64,
    /// Bytes a second at which packets leave at most; 0 while nothing is known.
    pub pacing_rate: u64,
    /// What the path is thought to deliver to this session, bytes a second; 0 while that is not known.
    pub bandwidth: u64,
    /// Whether what this side sends yields to others.
    pub background: bool,
    /// UDP payload that the path is known to carry, bytes.
    pub mtu: u16,
    /// Connections side by side.
    pub connections: u32,
    /// How often the session has gone on over another connection.
    pub reconnects: u64,
    /// How often the path stopped to carry large packets. More than zero under load may be loss
    /// mistaken for it: set [`Tuning::min_payload`](crate::Tuning::min_payload).
    pub black_holes: u64,
    /// Payload by class; index with [`Class::index`].
    pub classes: [ClassBytes; Class::ALL.len()],
}

impl PathStats {
    /// Bytes that the path holds: what it is thought to deliver in a round trip without queue; the
    /// congestion window where nobody has a model of it.
    pub fn holds(&self) -> u64 {
        match self.bandwidth {
            0 => self.cwnd,
            rate => carried(rate, self.min_rtt),
        }
    }

    /// With what another connection of the same session has cost and carried.
    pub(crate) fn beside(mut self, other: &Self) -> Self {
        self.rtt = self.rtt.max(other.rtt);
        self.min_rtt = self.min_rtt.min(other.min_rtt);
        self.wire_bytes_sent += other.wire_bytes_sent;
        self.wire_bytes_received += other.wire_bytes_received;
        self.sent_packets += other.sent_packets;
        self.lost_packets += other.lost_packets;
        self.lost_bytes += other.lost_bytes;
        self.cwnd += other.cwnd;
        self.pacing_rate += other.pacing_rate;
        self.bandwidth += other.bandwidth;
        self.mtu = self.mtu.min(other.mtu);
        self.connections += other.connections;
        self.reconnects += other.reconnects;
        self.black_holes += other.black_holes;
        for (sum, more) in self.classes.iter_mut().zip(other.classes) {
            *sum += more;
        }
        self
    }

    /// Payload of `class`.
    pub fn class(&self, class: Class) -> ClassBytes {
        self.classes[class.index()]
    }
}

/// What connections have cost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    /// How many they were.
    pub(crate) connections: u64,
    wire_bytes_sent: u64,
    wire_bytes_received: u64,
    sent_packets: u64,
    lost_packets: u64,
    lost_bytes: u64,
    black_holes: u64,
}

impl Totals {
    /// Adds what `connection` has cost so far.
    pub(crate) fn add(&mut self, connection: &quinn::Connection) {
        let header = header_bytes(connection.remote_address());
        let stats = connection.stats();
        self.wire_bytes_sent += stats.udp_tx.bytes + stats.udp_tx.datagrams * header;
        self.wire_bytes_received += stats.udp_rx.bytes + stats.udp_rx.datagrams * header;
        self.sent_packets += stats.path.sent_packets;
        self.lost_packets += stats.path.lost_packets;
        self.lost_bytes += stats.path.lost_bytes;
        self.black_holes += stats.path.black_holes_detected;
    }
}

/// Counters of one session.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    classes: [[AtomicU64; 3]; Class::ALL.len()],
}

impl Counters {
    pub(crate) fn count_sent(&self, class: Class, bytes: usize) {
        self.add(class, 0, bytes);
    }

    pub(crate) fn count_acked(&self, class: Class, bytes: usize) {
        self.add(class, 1, bytes);
    }

    pub(crate) fn count_received(&self, class: Class, bytes: usize) {
        self.add(class, 2, bytes);
    }

    fn add(&self, class: Class, which: usize, bytes: usize) {
        self.classes[class.index()][which].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What there is to say of a session that is on `line` now and was on others before.
    pub(crate) fn snapshot(&self, past: Totals, line: &Line) -> PathStats {
        let mut totals = past;
        totals.add(&line.connection);
        let path = line.connection.stats().path;
        let [pacing_rate, bandwidth] = line.pacing.rates();
        let classes = self.classes.each_ref().map(|[sent, acked, received]| ClassBytes {
            sent: sent.load(Ordering::Relaxed),
            acked: acked.load(Ordering::Relaxed),
            received: received.load(Ordering::Relaxed),
        });
        PathStats {
            rtt: path.rtt,
            min_rtt: path.min_rtt,
            wire_bytes_sent: totals.wire_bytes_sent,
            wire_bytes_received: totals.wire_bytes_received,
            sent_packets: totals.sent_packets,
            lost_packets: totals.lost_packets,
            lost_bytes: totals.lost_bytes,
            cwnd: path.cwnd,
            pacing_rate,
            bandwidth,
            background: line.pacing.is_background(),
            mtu: path.current_mtu,
            connections: 1,
            reconnects: totals.connections,
            black_holes: totals.black_holes,
            classes,
        }
    }
}

/// IP and UDP header of one datagram to `remote`.
pub(crate) fn header_bytes(remote: SocketAddr) -> u64 {
    if remote.ip().to_canonical().is_ipv4() { IPV4_UDP_HEADER } else { IPV6_UDP_HEADER }
}
