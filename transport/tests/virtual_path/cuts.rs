//! Sessions that outlive their connection: what a cut costs, and that nothing is lost or doubled by it.
//!
//! Invariant: every batch and every message is looked at when it arrives, so a doubled one is found.

use std::time::Duration;

use bytes::Bytes;
use longhaul_bench::profile::Profile;
use longhaul_transport::{Class, CloseReason, RecvError, SendError, Tuning};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use super::pair::{BATCH, MIB, Pair, Seen, connect, path, send_numbered};

const PATIENCE: Duration = Duration::from_secs(300);
/// Batches that the sender prepares side by side.
const SENDERS: usize = 4;

/// What a transfer took.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    wire_bytes: u64,
    /// Of these, lost by the link itself, cuts included: one repeat of each has to be.
    lost_bytes: u64,
    reconnects: u64,
}

async fn patient(profile: &Profile, seed: u64) -> Pair {
    let pair = connect(profile, seed, Tuning::default()).await;
    pair.from.set_patience(PATIENCE);
    pair.to.set_patience(2 * PATIENCE);
    // Time to tell each other.
    pair.from.send_batch_acked(Class::Seed, b"begun", vec![]).await.unwrap();
    pair.to.recv_batch().await.unwrap();
    pair.from.send_batch_acked(Class::Seed, b"begun", vec![]).await.unwrap();
    pair.to.recv_batch().await.unwrap();
    pair
}

/// Moves batches one way and messages both ways, with a cut for `cuts[n].1` seconds at `cuts[n].0`.
async fn transfer(profile: &Profile, megabytes: usize, seed: u64, cuts: &[(f64, f64)]) -> Cost {
    let pair = patient(profile, seed).await;
    let batches = megabytes * MIB / BATCH;
    let began = Instant::now();
    let mut tasks = send_numbered(&pair.from, SENDERS, batches);
    // A message for every batch that arrives, and its echo.
    let (echo, mut heard) = pair.from.control().unwrap();
    let (tell, mut echoes) = pair.to.control().unwrap();
    tasks.spawn(async move {
        for expected in 0..batches as u64 {
            let number = heard.recv::<u64>().await.unwrap().unwrap();
            assert_eq!(number, expected);
            echo.send(&number).await.unwrap();
        }
        echo.finish().await.unwrap();
    });
    let near = pair.near.clone();
    let cuts = cuts.to_vec();
    let cutting = tokio::spawn(async move {
        for (at, length) in cuts {
            tokio::time::sleep_until(began + Duration::from_secs_f64(at)).await;
            near.cut();
            tokio::time::sleep(Duration::from_secs_f64(length)).await;
            near.restore();
        }
    });
    let mut seen = Seen::none_of(batches);
    for count in 0..batches {
        seen.take(&pair.to.recv_batch().await.unwrap());
        tell.send(&(count as u64)).await.unwrap();
    }
    let seconds = began.elapsed().as_secs_f64();
    for expected in 0..batches as u64 {
        assert_eq!(echoes.recv::<u64>().await.unwrap(), Some(expected));
    }
    assert_eq!(echoes.recv::<u64>().await.unwrap(), None);
    tasks.join_all().await;
    cutting.abort();
    let stats = pair.from.stats();
    let sent = pair.near.sent();
    let (wire_bytes, lost_bytes) = (sent.offered_bytes, sent.lost_bytes);
    assert!(stats.wire_bytes_sent <= wire_bytes && stats.wire_bytes_sent > wire_bytes * 98 / 100);
    assert_eq!(stats.class(Class::Pages).sent, (batches * BATCH) as u64);
    Cost { seconds, wire_bytes, lost_bytes, reconnects: stats.reconnects }
}

/// Percent of more bytes than without a cut; and of those that the link did not lose.
fn more(cost: Cost, plain: Cost) -> [f64; 2] {
    let than = |bytes: u64, plain: u64| 100.0 * (bytes as f64 / plain as f64 - 1.0);
    let needless = |cost: Cost| cost.wire_bytes - cost.lost_bytes;
    [than(cost.wire_bytes, plain.wire_bytes), than(needless(cost), needless(plain))]
}

#[tokio::test(start_paused = true)]
async fn a_cut_costs_its_time_and_hardly_a_byte() {
    let profile = Profile::named("continental").unwrap();
    let plain = transfer(&profile, 1024, 1, &[]).await;
    let cut = transfer(&profile, 1024, 1, &[(15.0, 60.0)]).await;
    let lost = cut.seconds - plain.seconds - 60.0;
    let [more, needless] = more(cut, plain);
    println!("60 s cut: {lost:.2} s beyond it, {more:.2} % more bytes, {needless:.2} % needless");
    assert!(lost < 3.0, "{cut:?} {plain:?}");
    assert!(more < 1.0, "{cut:?} {plain:?}");
    assert_eq!(cut.reconnects, 1);
}

#[tokio::test(start_paused = true)]
async fn ten_cuts_cost_their_time() {
    let profile = Profile::named("continental").unwrap();
    let plain = transfer(&profile, 1024, 2, &[]).await;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(2);
    let (mut at, mut cuts, mut sum) = (2.0, Vec::new(), 0.0);
    for _ in 0..10 {
        let length = f64::from(random.random_range(5..400)) / 10.0;
        cuts.push((at, length));
        sum += length;
        at += length + f64::from(random.random_range(10..50)) / 10.0;
    }
    let cut = transfer(&profile, 1024, 2, &cuts).await;
    let lost = cut.seconds - plain.seconds - sum;
    let [more, needless] = more(cut, plain);
    println!(
        "ten cuts of {sum:.1} s in all: {lost:.2} s beyond them, {more:.2} % more bytes, {needless:.2} % \
         needless, {} reconnects",
        cut.reconnects
    );
    assert!(lost < 25.0, "{cut:?} {plain:?}");
    // What was in flight when the link went is gone each time.
    assert!(more < 4.0, "{cut:?} {plain:?}");
    assert!(needless < 1.0, "{cut:?} {plain:?}");
}

#[tokio::test(start_paused = true)]
async fn who_has_no_patience_or_runs_out_of_it_is_told() {
    let pair = patient(&path(100, 50, 0), 1).await;
    pair.to.set_patience(Duration::from_secs(40));
    pair.to.send_batch_acked(Class::Seed, b"told", vec![]).await.unwrap();
    let began = Instant::now();
    pair.near.cut();
    let sending = pair.from.send_batch_acked(Class::Pages, b"", vec![]).await;
    assert_eq!(sending, Err(SendError::Closed(CloseReason::Cut)));
    // QUIC itself waits for half a minute.
    let took = began.elapsed().as_secs_f64();
    assert!((60.0..85.0).contains(&took), "{took}");
    assert_eq!(pair.to.recv_batch().await, Err(RecvError::Closed(CloseReason::Cut)));
    let took = began.elapsed().as_secs_f64();
    assert!((60.0..85.0).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn patience_can_be_taken_back_while_the_link_is_down() {
    let pair = patient(&path(100, 50, 0), 1).await;
    pair.near.cut();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(pair.to.down_for().is_some());
    pair.to.set_patience(Duration::ZERO);
    assert_eq!(pair.to.closed().await, CloseReason::Cut);
    // The one that still waits hears of it as soon as the link is there again.
    pair.near.restore();
    assert_eq!(pair.from.closed().await, CloseReason::Forgotten);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_closed_in_a_cut_is_closed() {
    let pair = patient(&path(100, 50, 0), 1).await;
    pair.near.cut();
    tokio::time::sleep(Duration::from_secs(40)).await;
    pair.from.close("enough");
    assert_eq!(pair.from.closed().await, CloseReason::Local { reason: "enough".into() });
    pair.to.refuse("me too");
    assert!(pair.to.recv_batch().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_was_given_up_in_a_cut_leaves_nothing() {
    let pair = patient(&path(100, 50, 0), 1).await;
    let sending = tokio::spawn({
        let from = pair.from.clone();
        let body = vec![Bytes::from(vec![1; 8 * BATCH])];
        async move { from.send_batch(Class::Pages, b"", body).await }
    });
    tokio::time::sleep(Duration::from_millis(400)).await;
    pair.near.cut();
    tokio::time::sleep(Duration::from_secs(40)).await;
    sending.abort();
    pair.near.restore();
    pair.from.send_batch_acked(Class::Pages, b"next", vec![]).await.unwrap();
    assert_eq!(pair.to.recv_batch().await.unwrap().body, "next");
    assert_eq!(pair.from.stats().reconnects, 1);
}

/// A listener that was restarted does not know the session, and says so as soon as it can.
#[tokio::test(start_paused = true)]
async fn a_listener_that_left_is_not_waited_for() {
    let pair = patient(&path(100, 50, 0), 1).await;
    pair.endpoints[1].close().await;
    assert!(matches!(pair.from.closed().await, CloseReason::Shutdown { .. }));
}
