//! The transport over long and lossy paths, in virtual time: published quinn, our sessions and
//! congestion control, a simulated link. Seconds of simulated time take a fraction of real time.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in what its cases share")]

mod bbr_v1;
mod caps;
mod cubic;
mod cuts;
mod grid;
mod lanes;
mod link;
mod moves;
mod pair;
#[path = "../hostile/raw.rs"]
mod raw;
mod sharing;
mod stalls;
mod tcp;

use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{
    Class, CloseReason, Congestion, IDLE_TIMEOUT, RateLimiter, RecvError, SendError, Tuning,
};
use tokio::time::Instant;

use pair::{BATCH, MIB, Pair, connect, path, transfer};

/// The reason for an own controller: the same path collapses under CUBIC.
#[tokio::test(start_paused = true)]
async fn cubic_stays_selectable_and_slow_on_a_lossy_path() {
    let tuning = Tuning { congestion: Congestion::Cubic, ..Tuning::default() };
    let figures = transfer(&path(200, 80, 1_000), 16, 1, tuning).await;
    println!("CUBIC, 200 Mbit/s, 80 ms, 0.1 %: {:.1} % of the link", figures.goodput);
    assert!(figures.goodput < 30.0, "{figures:?}");
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
    let pair = connect(&path(100, 50, 0), 1, Tuning::default()).await;
    measure(&pair, 32 * MIB).await;
    pair.near.set_rate_mbit(20);
    measure(&pair, 16 * MIB).await;
    let before = pair.near.sent();
    let slow = measure(&pair, 16 * MIB).await;
    let after = pair.near.sent();
    let loss = (after.dropped - before.dropped) as f64 / (after.offered - before.offered) as f64;
    assert!(slow > 15e6, "{slow}");
    assert!(loss < 0.03, "{loss}");
    pair.near.set_rate_mbit(200);
    measure(&pair, 32 * MIB).await;
    let fast = measure(&pair, 64 * MIB).await;
    assert!(fast > 150e6, "{fast}");
}

#[tokio::test(start_paused = true)]
async fn a_capped_job_sends_at_its_cap_and_is_fast_when_the_cap_is_lifted() {
    let pair = connect(&path(200, 80, 1_000), 1, Tuning::default()).await;
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
    let pair = connect(&path(20, 50, 0), 1, Tuning::default()).await;
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
    let pair = connect(&path(100, 50, 0), 1, Tuning::default()).await;
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
    let pair = connect(&path(1, 300, 0), 1, Tuning::default()).await;
    tokio::time::sleep(20 * IDLE_TIMEOUT).await;
    assert_eq!(pair.from.close_reason(), None);
    pair.from.send_batch_acked(Class::Pages, b"still", vec![]).await.unwrap();
    assert_eq!(pair.to.recv_batch().await.unwrap().body, "still");
}
