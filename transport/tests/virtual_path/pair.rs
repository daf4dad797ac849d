//! Two endpoints at the ends of a virtual link, and what a transfer between them achieves.
//!
//! Invariant: a figure is of the whole transfer, its start included.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use longhaul_bench::profile::Profile;
use longhaul_transport::{
    Batch, Class, Endpoint, Fingerprint, Identity, Session, TrustedPeers, Tuning,
};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::link::{End, Line};

pub(crate) const MIB: usize = 1024 * 1024;
/// Size of the batches in these tests.
pub(crate) const BATCH: usize = MIB;
/// Batches that the sender prepares side by side.
const SENDERS: usize = 4;

pub(crate) struct Pair {
    pub(crate) near: Arc<End>,
    /// The dialer's, and the listener's.
    pub(crate) endpoints: [Endpoint; 2],
    far: (SocketAddr, Fingerprint),
    pub(crate) from: Session,
    pub(crate) to: Session,
}

/// A path with a queue of one bandwidth-delay product.
pub(crate) fn path(rate_mbit: u64, rtt_ms: u64, loss_ppm: u32) -> Profile {
    let rate_bits_per_s = rate_mbit * 1_000_000;
    Profile {
        name: format!("{rate_mbit} Mbit/s, {rtt_ms} ms, {} %", f64::from(loss_ppm) / 10_000.0),
        rate_bits_per_s,
        rtt_us: rtt_ms * 1_000,
        loss: f64::from(loss_ppm) / 1e6,
        queue_bytes: Some(rate_bits_per_s * rtt_ms / 8_000),
        ..Profile::named("metro").unwrap()
    }
}

pub(crate) async fn connect(profile: &Profile, seed: u64, tuning: Tuning) -> Pair {
    connect_over(&Line::new(profile, seed), 0, seed, tuning).await
}

/// As [`connect`], as the `nth` pair of those that share `line`.
pub(crate) async fn connect_over(line: &Line, nth: u8, seed: u64, tuning: Tuning) -> Pair {
    let home = tempfile::tempdir().unwrap();
    let identity = |name| Identity::load_or_create(&home.path().join(name)).unwrap();
    let (near_id, far_id) = (identity("near"), identity("far"));
    let trust = Arc::new(TrustedPeers::new([near_id.fingerprint(), far_id.fingerprint()]));
    let (near, far) = line.pair(nth);
    let simulation_seed = Some(seed + 1000 * u64::from(nth));
    let tuning = Tuning { simulation_seed, ..tuning };
    let open = |end: &Arc<End>, id: &Identity| {
        Endpoint::on_socket(end.clone(), id, trust.clone(), tuning.clone()).unwrap()
    };
    let endpoints = [open(&near, &near_id), open(&far, &far_id)];
    let far = (far.addr(), far_id.fingerprint());
    let (from, to) = session(&endpoints, far).await;
    Pair { near, endpoints, far, from, to }
}

async fn session([near, far]: &[Endpoint; 2], to: (SocketAddr, Fingerprint)) -> (Session, Session) {
    let (from, to) = tokio::join!(near.connect(to.0, to.1), far.accept());
    (from.unwrap(), to.unwrap())
}

impl Pair {
    /// One more session between the two.
    pub(crate) async fn another(&self) -> (Session, Session) {
        session(&self.endpoints, self.far).await
    }
}

/// Sends batches that begin with their number, so many side by side.
pub(crate) fn send_numbered(from: &Session, senders: usize, batches: usize) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let body = Bytes::from(vec![0x5a; BATCH - 8]);
    for sender in 0..senders {
        let (from, body) = (from.clone(), body.clone());
        tasks.spawn(async move {
            for number in (sender..batches).step_by(senders) {
                let header = (number as u64).to_le_bytes();
                from.send_batch(Class::Pages, &header, vec![body.clone()]).await.unwrap();
            }
        });
    }
    tasks
}

/// Which of the numbered batches have come.
pub(crate) struct Seen(pub(crate) Vec<bool>);

impl Seen {
    pub(crate) fn none_of(batches: usize) -> Self {
        Self(vec![false; batches])
    }

    /// Takes one in that must be whole and new.
    pub(crate) fn take(&mut self, batch: &Batch) {
        assert_eq!(batch.body.len(), BATCH);
        let number = u64::from_le_bytes(batch.body[..8].try_into().unwrap()) as usize;
        assert!(!std::mem::replace(&mut self.0[number], true), "batch {number} came twice");
    }
}

/// What a transfer achieved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figures {
    pub(crate) seconds: f64,
    /// Payload over what the link could have carried of it, headers taken off, percent.
    pub(crate) goodput: f64,
    /// Bytes that need not have been sent over those that had to be, percent: every packet that was
    /// sent again and that the link itself had not lost.
    pub(crate) waste: f64,
    /// Packets dropped by the full queue, of those sent, percent.
    pub(crate) overflow: f64,
    /// Median of what round trips took longer than the path, over its round trip, percent.
    pub(crate) queueing: f64,
    pub(crate) mtu: u16,
}

pub(crate) async fn transfer(
    profile: &Profile,
    megabytes: usize,
    seed: u64,
    tuning: Tuning,
) -> Figures {
    let pair = connect(profile, seed, tuning).await;
    let began = Instant::now();
    let batches = megabytes * MIB / BATCH;
    let mut senders = JoinSet::new();
    let body = Bytes::from(vec![0x5a; BATCH]);
    for sender in 0..SENDERS {
        let (from, body) = (pair.from.clone(), body.clone());
        senders.spawn(async move {
            for _ in (sender..batches).step_by(SENDERS) {
                from.send_batch(Class::Pages, b"", vec![body.clone()]).await.unwrap();
            }
        });
    }
    let mut delays = Vec::new();
    let receiving = async {
        for _ in 0..batches {
            assert_eq!(pair.to.recv_batch().await.unwrap().body.len(), BATCH);
        }
    };
    let watching = async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            delays.push(pair.from.stats().rtt.saturating_sub(profile.rtt()));
        }
    };
    tokio::select! {
        biased;
        () = receiving => {}
        () = watching => {}
    }
    let took = began.elapsed();
    let (tally, stats) = (pair.near.sent(), pair.from.stats());
    let percent = |part: f64, whole: f64| 100.0 * part / whole;
    let payload = (batches * BATCH) as f64;
    let repeated = stats.lost_packets as f64;
    let needless = (repeated - tally.lost as f64).max(0.0);
    // What a packet's headers take, from the packets that were sent.
    let once = tally.offered_bytes as f64 * (1.0 - repeated / tally.offered as f64);
    let since = pair.near.age();
    let carried = profile.carried_bytes(since - took, since);
    delays.sort();
    let median = delays.get(delays.len() / 2).copied().unwrap_or_default();
    Figures {
        seconds: took.as_secs_f64(),
        goodput: percent(payload, carried * payload / once),
        waste: percent(needless, tally.offered as f64 - needless),
        overflow: percent(tally.dropped as f64, tally.offered as f64),
        queueing: percent(median.as_secs_f64(), profile.rtt().as_secs_f64()),
        mtu: stats.mtu,
    }
}
