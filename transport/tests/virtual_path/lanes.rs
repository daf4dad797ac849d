//! Sessions over several connections side by side: what is carried, capped and ended is the session's.
//!
//! Invariant: every batch is looked at when it arrives, so a doubled or a missing one is found.

use std::time::Duration;

use bytes::Bytes;
use longhaul_bench::profile::Profile;
use longhaul_transport::{Class, CloseReason, LANES_MAX, RateLimiter, SendError, Tuning};
use tokio::time::Instant;

use super::pair::{BATCH, MIB, Pair, Seen, connect, path, send_numbered};

/// Batches that the sender prepares side by side.
const SENDERS: usize = 8;

/// A session with so many lanes.
async fn wide(profile: &Profile, lanes: usize) -> Pair {
    let pair = connect(profile, 1, Tuning::default()).await;
    for _ in 0..lanes {
        pair.from.widen().await.unwrap();
    }
    pair
}

/// Moves so many batches, and returns how long that took.
async fn transfer(pair: &Pair, batches: usize) -> Duration {
    let began = Instant::now();
    let tasks = send_numbered(&pair.from, SENDERS, batches);
    let mut seen = Seen::none_of(batches);
    for _ in 0..batches {
        seen.take(&pair.to.recv_batch().await.unwrap());
    }
    let took = began.elapsed();
    tasks.join_all().await;
    took
}

/// Every lane carries its part, and what is urgent finds its way beside them.
#[tokio::test(start_paused = true)]
async fn lanes_carry_a_session_together() {
    let profile = Profile::named("continental").unwrap();
    let pair = wide(&profile, 2).await;
    let urgent = {
        let from = pair.from.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            from.send_batch_acked(Class::HandOver, b"", vec![]).await.unwrap();
        }
    };
    let urgent = tokio::spawn(urgent);
    let batches = 256;
    let (mut bulk, mut handed_over) = (Seen::none_of(batches), 0);
    let tasks = send_numbered(&pair.from, SENDERS, batches);
    let began = Instant::now();
    while bulk.0.iter().any(|seen| !seen) || handed_over == 0 {
        let batch = pair.to.recv_batch().await.unwrap();
        match batch.class {
            Class::HandOver => handed_over += 1,
            _ => bulk.take(&batch),
        }
    }
    let took = began.elapsed().as_secs_f64();
    urgent.await.unwrap();
    tasks.join_all().await;
    let stats = pair.from.stats();
    assert_eq!((stats.connections, pair.to.stats().connections), (3, 3));
    assert_eq!(stats.class(Class::Pages).sent, (batches * BATCH) as u64);
    let offered = pair.near.sent().offered_bytes;
    assert!(stats.wire_bytes_sent <= offered && stats.wire_bytes_sent > offered * 98 / 100);
    let used = (batches * BATCH) as f64 * 8.0 / took / profile.rate_bits_per_s as f64;
    println!("three connections: {:.1} % of the link", 100.0 * used);
    assert!(used > 0.8, "{used}");
}

/// A cut takes all of them down and none of their batches.
#[tokio::test(start_paused = true)]
async fn a_cut_takes_all_lanes_and_no_batch() {
    let patience = Duration::from_secs(300);
    let pair = wide(&path(100, 40, 1_000), 2).await;
    pair.from.set_patience(patience);
    pair.to.set_patience(patience);
    transfer(&pair, 16).await;
    let near = pair.near.clone();
    let cutting = tokio::spawn(async move {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(4)).await;
            near.cut();
            tokio::time::sleep(Duration::from_secs(20)).await;
            near.restore();
        }
    });
    transfer(&pair, 256).await;
    cutting.await.unwrap();
    let stats = pair.from.stats();
    assert!(stats.reconnects >= 6, "{stats:?}");
    assert!(pair.from.close_reason().is_none() && pair.to.close_reason().is_none());
}

/// A cap is the session's, however many carry it, and holds for those that come later.
#[tokio::test(start_paused = true)]
async fn a_cap_is_for_all_lanes_together() {
    let pair = wide(&path(100, 40, 0), 1).await;
    let agent = RateLimiter::new();
    agent.set_agent(Some("20M".parse().unwrap()));
    pair.from.set_rate(agent.job());
    pair.from.widen().await.unwrap();
    let before = pair.near.sent().offered_bytes;
    let took = transfer(&pair, 50).await.as_secs_f64();
    let rate = (pair.near.sent().offered_bytes - before) as f64 * 8.0 / took;
    println!("{:.2} Mbit/s of 20", rate / 1e6);
    assert!((19.0e6..=20.4e6).contains(&rate), "{rate}");
}

/// The session ends as one, whoever ends it, and there is an end to how many may be opened.
#[tokio::test(start_paused = true)]
async fn a_session_and_its_lanes_end_together() {
    let profile = path(100, 40, 0);
    let pair = wide(&profile, LANES_MAX).await;
    assert!(pair.from.widen().await.is_err(), "one too many");
    assert!(pair.to.widen().await.is_err(), "it did not connect");
    transfer(&pair, 16).await;
    pair.from.close("done");
    assert!(matches!(pair.to.closed().await, CloseReason::Clean { .. }));
    let after = pair.from.send_batch(Class::Pages, b"", vec![]).await;
    assert!(matches!(after, Err(SendError::Closed(_))), "{after:?}");

    // What is left of them does not stand in the way of others.
    for _ in 0..40 {
        let (from, to) = pair.another().await;
        from.widen().await.unwrap();
        drop(to);
        assert!(matches!(from.closed().await, CloseReason::Shutdown { .. }));
    }
    let lost = wide(&profile, 2).await;
    lost.near.cut();
    let sent = lost.from.send_batch_acked(Class::Pages, b"", vec![Bytes::from(vec![0; MIB])]).await;
    assert!(matches!(sent, Err(SendError::Closed(_))), "{sent:?}");
    lost.from.closed().await;
}
