//! Peers that stand still: who is dropped for it, when, and who is not.
//!
//! Invariant: nobody is dropped who keeps to the protocol, however long caps or a slow reader hold what
//! it has begun.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{
    Class, CloseReason, Endpoint, HANDSHAKE_TIMEOUT, Identity, RateLimiter, STALL_TIMEOUT, Session,
    TrustedPeers, Tuning,
};
use quinn::{Connection, EndpointConfig, TokioRuntime};
use tokio::time::Instant;

use super::link::Line;
use super::pair::{BATCH, MIB, connect, path};
use super::raw::{Raw, SEEN_NOTHING, config, end, head};

/// A connection of a raw peer to an endpoint; what keeps both.
async fn meet() -> (Connection, Endpoint, quinn::Endpoint) {
    let home = tempfile::tempdir().unwrap();
    let identity = |name| Identity::load_or_create(&home.path().join(name)).unwrap();
    let (raw, own) = (identity("raw"), identity("own"));
    let trust = Arc::new(TrustedPeers::new([raw.fingerprint()]));
    let (near, far) = Line::new(&path(100, 50, 0), 1).pair(0);
    let addr = far.addr();
    let endpoint = Endpoint::on_socket(far, &own, trust, Tuning::default()).unwrap();
    let runtime = Arc::new(TokioRuntime);
    let raw =
        quinn::Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, near, runtime);
    let raw = raw.unwrap();
    let connecting = raw.connect_with(config(&home.path().join("raw")), addr, "any").unwrap();
    (connecting.await.unwrap(), endpoint, raw)
}

/// Expects that both ends learn of the stall, and no sooner or later than is said.
async fn dropped(raw: &Raw, to: &Session, since: Instant) {
    let (code, reason) = end(&raw.connection).await;
    assert_eq!(code, 3);
    assert_eq!(reason, "it has said nothing for 120 s, over a link that works");
    assert_eq!(to.closed().await, CloseReason::Violation { detail: reason });
    assert!(since.elapsed().abs_diff(STALL_TIMEOUT) < Duration::from_secs(1), "{since:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_greets_is_dropped() {
    let (connection, endpoint, _raw) = meet().await;
    let began = Instant::now();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(b"\x40\0\0\0LHUL").await.unwrap();
    let reason = "no whole greeting came within 10 s".to_owned();
    assert_eq!(end(&connection).await, (3, reason));
    assert!(began.elapsed() <= HANDSHAKE_TIMEOUT + Duration::from_secs(1));
    endpoint.close().await;
    assert!(endpoint.accept().await.is_none(), "no session came of it");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stands_still_in_what_it_says_is_dropped() {
    let (connection, endpoint, _raw) = meet().await;
    let mut raw = Raw::greet(connection, 1).await;
    let to = endpoint.accept().await.unwrap();
    let since = Instant::now();
    let (mut receipts, _recv) = raw.connection.open_bi().await.unwrap();
    receipts.write_all(&SEEN_NOTHING).await.unwrap();
    let _stream = raw.stream(&[&head(0, 0, 1000)[..], b"half"].concat()).await;
    raw.control.0.write_all(&[9, 0, 0, 0, 1]).await.unwrap();
    dropped(&raw, &to, since).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_opens_its_receipts_is_dropped() {
    let (connection, endpoint, _raw) = meet().await;
    let raw = Raw::greet(connection, 1).await;
    let to = endpoint.accept().await.unwrap();
    dropped(&raw, &to, Instant::now()).await;
}

/// Whole batches that nobody takes are this end's own doing, but only while they leave no room.
#[tokio::test(start_paused = true)]
async fn a_batch_that_waits_is_no_excuse() {
    let (connection, endpoint, _raw) = meet().await;
    let raw = Raw::greet(connection, 1).await;
    let to = endpoint.accept().await.unwrap();
    let since = Instant::now();
    raw.stream(&head(0, 0, 0)).await.finish().unwrap();
    dropped(&raw, &to, since).await;
    assert_eq!(to.recv_batch().await.unwrap().body, "");
}

/// The host's cap goes to more urgent batches of another job, for a long time.
#[tokio::test(start_paused = true)]
async fn a_batch_that_waits_for_its_turn_is_no_stall() {
    let pair = connect(&path(100, 50, 0), 1, Tuning::default()).await;
    let (other, other_end) = pair.another().await;
    let agent = RateLimiter::new();
    pair.from.set_rate(agent.job());
    other.set_rate(agent.job());
    agent.set_agent(Some("2M".parse().unwrap()));
    let waiting = tokio::spawn({
        let from = pair.from.clone();
        let body = vec![Bytes::from(vec![1; BATCH])];
        async move { from.send_batch_acked(Class::Seed, b"", body).await }
    });
    // It is in its middle when the other job begins.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    let mut urgent = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let other = other.clone();
        urgent.spawn(async move {
            while began.elapsed() < 5 * STALL_TIMEOUT {
                let body = vec![Bytes::from(vec![2; BATCH / 4])];
                other.send_batch(Class::Pages, b"", body).await.unwrap();
            }
        });
    }
    let taking = tokio::spawn(async move { while other_end.recv_batch().await.is_ok() {} });
    urgent.join_all().await;
    assert!(!waiting.is_finished(), "it was to wait");
    assert_eq!(pair.to.recv_batch().await.unwrap().body.len(), BATCH);
    waiting.await.unwrap().unwrap();
    taking.abort();
}

/// The peer cannot say anything where this end takes nothing.
#[tokio::test(start_paused = true)]
async fn an_end_that_takes_nothing_does_not_blame_its_peer() {
    let pair = connect(&path(1000, 50, 0), 1, Tuning::default()).await;
    let batches = 320 * MIB / BATCH;
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..batches {
        let from = pair.from.clone();
        senders.spawn(async move {
            // Of all classes that share the memory for bulk, so that many are on the way.
            let class = [Class::Seed, Class::Blocks, Class::Pages][sender % 3];
            from.send_batch(class, b"", vec![Bytes::from(vec![1; BATCH])]).await
        });
    }
    tokio::time::sleep(5 * STALL_TIMEOUT).await;
    assert_eq!(pair.to.close_reason(), None);
    for count in 0..batches {
        pair.to.recv_batch().await.unwrap_or_else(|error| panic!("after {count}: {error}"));
    }
    for sent in senders.join_all().await {
        sent.unwrap();
    }
}
