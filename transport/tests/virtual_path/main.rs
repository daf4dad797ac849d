//! The transport over long and lossy paths, in virtual time: published quinn, our sessions and
//! congestion control, a simulated link. Seconds of simulated time take a fraction of real time,
//! and the same seed gives nearly the same figures (connection ids and keys are not seeded).

#![allow(clippy::unwrap_used, reason = "a test may panic, also in what its cases share")]

mod link;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use link::{End, Path};
use longhaul_transport::{
    Class, CloseReason, Congestion, Endpoint, IDLE_TIMEOUT, Identity, RateLimiter, RecvError,
    SendError, Session, TrustedPeers, Tuning,
};
use tokio::time::Instant;

const MIB: usize = 1024 * 1024;
/// Size of the batches in these tests.
const BATCH: usize = MIB;
/// Batches that the sender prepares side by side.
const SENDERS: usize = 4;

struct Pair {
    near: Arc<End>,
    /// Kept open.
    _endpoints: [Endpoint; 2],
    from: Session,
    to: Session,
}

async fn connect(path: Path, seed: u64, tuning: Tuning) -> Pair {
    let home = tempfile::tempdir().unwrap();
    let identity = |name| Identity::load_or_create(&home.path().join(name)).unwrap();
    let (near_id, far_id) = (identity("near"), identity("far"));
    let trust = Arc::new(TrustedPeers::new([near_id.fingerprint(), far_id.fingerprint()]));
    let (near, far) = link::pair(path, seed);
    let open = |end: &Arc<End>, id: &Identity| {
        Endpoint::on_socket(end.clone(), id, trust.clone(), tuning.clone()).unwrap()
    };
    let endpoints = [open(&near, &near_id), open(&far, &far_id)];
    let (from, to) =
        tokio::join!(endpoints[0].connect(far.addr(), far_id.fingerprint()), endpoints[1].accept());
    Pair { near, _endpoints: endpoints, from: from.unwrap(), to: to.unwrap() }
}

/// What a transfer achieved.
#[derive(Debug)]
struct Figures {
    seconds: f64,
    /// Payload over what the link could have carried, percent.
    utilisation: f64,
    /// Packets that the link or its queue lost, of those sent, percent.
    link_loss: f64,
    /// Of which dropped by the full queue, percent of those sent.
    overflow: f64,
    /// Bytes that QUIC sent again, of all it sent, percent.
    repeated: f64,
    mtu: u16,
}

async fn transfer(path: Path, megabytes: usize, seed: u64, tuning: Tuning) -> Figures {
    let pair = connect(path, seed, tuning).await;
    let began = Instant::now();
    let batches = megabytes * MIB / BATCH;
    let mut senders = tokio::task::JoinSet::new();
    let body = Bytes::from(vec![0x5a; BATCH]);
    for sender in 0..SENDERS {
        let (from, body) = (pair.from.clone(), body.clone());
        senders.spawn(async move {
            for _ in (sender..batches).step_by(SENDERS) {
                from.send_batch(Class::Pages, b"", vec![body.clone()]).await.unwrap();
            }
        });
    }
    for _ in 0..batches {
        assert_eq!(pair.to.recv_batch().await.unwrap().body.len(), BATCH);
    }
    let took = began.elapsed();
    let (tally, stats) = (pair.near.sent(), pair.from.stats());
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole as f64;
    Figures {
        seconds: took.as_secs_f64(),
        utilisation: percent((batches * BATCH) as u64, path.rate.bytes_in(took)),
        link_loss: percent(tally.lost + tally.dropped, tally.offered),
        overflow: percent(tally.dropped, tally.offered),
        repeated: percent(stats.lost_bytes, stats.wire_bytes_sent),
        mtu: stats.mtu,
    }
}

async fn profile(name: &str, path: Path, megabytes: usize) -> Vec<Figures> {
    let mut all = Vec::new();
    for seed in [1, 2, 3] {
        let figures = transfer(path, megabytes, seed, Tuning::default()).await;
        println!(
            "{name}, {megabytes} MiB, seed {seed}: {:.1} s, {:.1} % of the link, lost {:.2} % \
             (queue {:.2} %), repeated {:.2} %, mtu {}",
            figures.seconds,
            figures.utilisation,
            figures.link_loss,
            figures.overflow,
            figures.repeated,
            figures.mtu,
        );
        all.push(figures);
    }
    all
}

fn assert_fast_and_clean(all: &[Figures]) {
    for figures in all {
        assert!(figures.utilisation >= 75.0, "{figures:?}");
        assert!(figures.link_loss <= 6.0, "{figures:?}");
        assert!(figures.repeated <= 6.0, "{figures:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn metro_1g_5ms() {
    assert_fast_and_clean(&profile("1 Gbit/s, 5 ms", Path::new("1G", 5, 0), 256).await);
}

#[tokio::test(start_paused = true)]
async fn continental_200m_80ms_lossy() {
    let path = Path::new("200M", 80, 1_000);
    assert_fast_and_clean(&profile("200 Mbit/s, 80 ms, 0.1 %", path, 192).await);
}

#[tokio::test(start_paused = true)]
async fn intercontinental_100m_200ms_lossier() {
    let path = Path::new("100M", 200, 5_000);
    assert_fast_and_clean(&profile("100 Mbit/s, 200 ms, 0.5 %", path, 128).await);
}

#[tokio::test(start_paused = true)]
async fn a_bottleneck_with_a_fifth_of_the_path_as_queue() {
    let path = Path { queue: 500_000, ..Path::new("200M", 100, 1_000) };
    assert_fast_and_clean(&profile("200 Mbit/s, 100 ms, 0.1 %, 20 ms queue", path, 192).await);
}

/// The reason for an own controller: the same path collapses under CUBIC.
#[tokio::test(start_paused = true)]
async fn cubic_stays_selectable_and_slow_on_a_lossy_path() {
    let tuning = Tuning { congestion: Congestion::Cubic, ..Tuning::default() };
    let figures = transfer(Path::new("200M", 80, 1_000), 16, 1, tuning).await;
    println!("CUBIC, 200 Mbit/s, 80 ms, 0.1 %: {:.1} % of the link", figures.utilisation);
    assert!(figures.utilisation < 30.0, "{figures:?}");
}

/// Sends `bytes` in batches and returns the rate in bits a second at which they arrived.
async fn measure(pair: &Pair, bytes: usize) -> f64 {
    let began = Instant::now();
    let sending = tokio::spawn({
        let from = pair.from.clone();
        async move {
            for _ in 0..bytes / BATCH {
                let body = vec![Bytes::from(vec![1; BATCH])];
                from.send_batch(Class::Blocks, b"", body).await.unwrap();
            }
        }
    });
    for _ in 0..bytes / BATCH {
        pair.to.recv_batch().await.unwrap();
    }
    sending.await.unwrap();
    (bytes * 8) as f64 / began.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn a_path_that_changes_is_followed() {
    let pair = connect(Path::new("100M", 50, 0), 1, Tuning::default()).await;
    measure(&pair, 32 * MIB).await;
    pair.near.set_rate("20M");
    measure(&pair, 16 * MIB).await;
    let before = pair.near.sent();
    let slow = measure(&pair, 16 * MIB).await;
    let after = pair.near.sent();
    let loss = (after.dropped - before.dropped) as f64 / (after.offered - before.offered) as f64;
    assert!(slow > 15e6, "{slow}");
    assert!(loss < 0.03, "{loss}");
    pair.near.set_rate("200M");
    measure(&pair, 32 * MIB).await;
    let fast = measure(&pair, 64 * MIB).await;
    assert!(fast > 150e6, "{fast}");
}

#[tokio::test(start_paused = true)]
async fn a_capped_job_sends_at_its_cap_and_is_fast_when_the_cap_is_lifted() {
    let pair = connect(Path::new("200M", 80, 1_000), 1, Tuning::default()).await;
    let agent = RateLimiter::new();
    let job = agent.job();
    pair.from.set_rate(job.clone());
    job.set_job(Some("20M".parse().unwrap()));
    let wire = |pair: &Pair| pair.from.stats().wire_bytes_sent;
    let (began, before) = (Instant::now(), wire(&pair));
    measure(&pair, 16 * MIB).await;
    let sent = (wire(&pair) - before) as f64 * 8.0 / began.elapsed().as_secs_f64();
    assert!((18e6..20.5e6).contains(&sent), "{sent}");

    job.set_job(None);
    measure(&pair, 16 * MIB).await;
    let free = measure(&pair, 64 * MIB).await;
    assert!(free > 140e6, "a slow sender was taken for a slow path: {free}");
}

#[tokio::test(start_paused = true)]
async fn the_hand_over_overtakes_bulk() {
    let pair = connect(Path::new("20M", 50, 0), 1, Tuning::default()).await;
    let mut bulk = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let from = pair.from.clone();
        bulk.spawn(async move {
            from.send_batch(Class::Seed, b"", vec![Bytes::from(vec![0; BATCH])]).await
        });
    }
    assert_eq!(pair.to.recv_batch().await.unwrap().class, Class::Seed);
    let began = Instant::now();
    let token = vec![Bytes::from_static(b"token")];
    pair.from.send_batch_acked(Class::HandOver, b"the ", token).await.unwrap();
    let took = began.elapsed();
    // The round trip and what is in flight already; the queued bulk would take 40 s.
    assert!(took < Duration::from_millis(300), "{took:?}");
    let batch = pair.to.recv_batch().await.unwrap();
    assert_eq!((batch.class, &batch.body[..]), (Class::HandOver, &b"the token"[..]));
    bulk.abort_all();
}

#[tokio::test(start_paused = true)]
async fn a_cut_is_told_from_a_close() {
    let pair = connect(Path::new("100M", 50, 0), 1, Tuning::default()).await;
    let (control, mut incoming) = pair.from.control().unwrap();
    let began = Instant::now();
    pair.near.cut();
    let reason = pair.from.closed().await;
    assert_eq!(reason, CloseReason::Cut);
    assert!(reason.is_retryable());
    let took = began.elapsed();
    assert!(took >= IDLE_TIMEOUT && took < 2 * IDLE_TIMEOUT, "{took:?}");
    assert_eq!(pair.to.closed().await, CloseReason::Cut);
    assert_eq!(pair.to.recv_batch().await, Err(RecvError::Closed(CloseReason::Cut)));
    assert_eq!(incoming.recv::<u8>().await, Err(RecvError::Closed(CloseReason::Cut)));
    assert_eq!(
        pair.from.send_batch(Class::Pages, b"", vec![]).await,
        Err(SendError::Closed(CloseReason::Cut))
    );
    // The task that writes notices on its own time; then every send says so.
    let error = loop {
        if let Err(error) = control.send(&1u8).await {
            break error;
        }
    };
    assert_eq!(error, SendError::Closed(CloseReason::Cut));
}

#[tokio::test(start_paused = true)]
async fn a_silent_session_stays() {
    let pair = connect(Path::new("1M", 300, 0), 1, Tuning::default()).await;
    tokio::time::sleep(20 * IDLE_TIMEOUT).await;
    assert_eq!(pair.from.close_reason(), None);
    pair.from.send_batch_acked(Class::Pages, b"still", vec![]).await.unwrap();
    assert_eq!(pair.to.recv_batch().await.unwrap().body, "still");
}
