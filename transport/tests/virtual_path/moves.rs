//! Peers whose address changes: a NAT that forgets, another uplink.
//!
//! Invariant: whoever sends and receives does not notice, and what had arrived is not sent again.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{Class, Session, Tuning};
use tokio::time::Instant;

use super::pair::{BATCH, MIB, Pair, connect, path};

const PATIENCE: Duration = Duration::from_secs(300);
const RATE_MBIT: u64 = 100;
const RTT_MS: u64 = 50;
/// Batches that go each way.
const BATCHES: usize = 128 * MIB / BATCH;
/// Batches that the sender prepares side by side.
const SENDERS: usize = 4;

/// What a transfer took.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    /// Bytes on the wire, there and back.
    wire_bytes: [u64; 2],
    reconnects: u64,
}

/// Sends batches; each comes once.
async fn carry(from: Session, to: Session) {
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..SENDERS {
        let from = from.clone();
        senders.spawn(async move {
            for number in (sender..BATCHES).step_by(SENDERS) {
                let body = vec![Bytes::from(vec![0x5a; BATCH - 8])];
                let header = (number as u64).to_le_bytes();
                from.send_batch_acked(Class::Pages, &header, body).await.unwrap();
            }
        });
    }
    let mut seen = [false; BATCHES];
    for _ in 0..BATCHES {
        let batch = to.recv_batch().await.unwrap();
        let number = u64::from_le_bytes(batch.body[..8].try_into().unwrap()) as usize;
        assert!(!std::mem::replace(&mut seen[number], true), "batch {number} came twice");
    }
    senders.join_all().await;
}

/// Moves batches both ways, while the side that connected gets these addresses, two seconds apart, each
/// in a cut of that length.
async fn transfer(addresses: &[SocketAddr], cut: Duration) -> Cost {
    let pair = connect(&path(RATE_MBIT, RTT_MS, 0), 1, Tuning::default()).await;
    let Pair { near, from, to, .. } = &pair;
    from.set_patience(PATIENCE);
    to.set_patience(PATIENCE);
    let began = Instant::now();
    let moving = async {
        for &address in addresses {
            tokio::time::sleep(Duration::from_secs(2)).await;
            near.cut();
            near.move_to(address);
            // Without a cut no packet falls in between.
            if !cut.is_zero() {
                tokio::time::sleep(cut).await;
            }
            near.restore();
        }
        std::future::pending::<()>().await;
    };
    let both = async {
        tokio::join!(carry(from.clone(), to.clone()), carry(to.clone(), from.clone()));
    };
    tokio::select! {
        () = both => {}
        () = moving => {}
    }
    let seconds = began.elapsed().as_secs_f64();
    if let Some(last) = addresses.last() {
        assert_eq!(to.remote_addr(), *last);
    }
    let wire_bytes = [from, to].map(|session| session.stats().wire_bytes_sent);
    Cost { seconds, wire_bytes, reconnects: from.stats().reconnects }
}

/// Moves to each of the addresses in a cut of so many seconds, and returns how often the session went on
/// over another connection.
async fn unnoticed(name: &str, addresses: &[&str], cut_s: u64) -> u64 {
    let addresses: Vec<SocketAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
    let plain = transfer(&[], Duration::ZERO).await;
    let moved = transfer(&addresses, Duration::from_secs(cut_s)).await;
    let each = addresses.len() as f64;
    let more = [0, 1].map(|way| moved.wire_bytes[way] as f64 - plain.wire_bytes[way] as f64);
    let later = (moved.seconds - plain.seconds) / each - cut_s as f64;
    let [there, back] = more.map(|bytes| bytes / each / MIB as f64);
    println!(
        "{name}: a change costs {later:.2} s, {there:.2} MiB there and {back:.2} MiB back, {} reconnects",
        moved.reconnects
    );
    assert!(later < if cut_s == 0 { 0.5 } else { 3.0 }, "{moved:?} {plain:?}");
    // What was on its way and in the queue before it, which is as long; and what a start anew loses.
    let on_the_way = 2.0 * (RATE_MBIT * RTT_MS * 125) as f64 / MIB as f64;
    assert!(there.max(back) < 1.5 * on_the_way, "{moved:?} {plain:?}");
    moved.reconnects
}

#[tokio::test(start_paused = true)]
async fn a_nat_that_gives_another_port_is_not_noticed() {
    let addresses = ["192.0.2.1:1024", "192.0.2.1:1025", "192.0.2.1:1026"];
    assert_eq!(unnoticed("another port", &addresses, 0).await, 0);
}

#[tokio::test(start_paused = true)]
async fn another_address_is_not_noticed() {
    let addresses = ["198.51.100.1:1", "198.51.100.2:2", "198.51.100.3:3"];
    assert_eq!(unnoticed("another address", &addresses, 0).await, 0);
}

/// QUIC has given the old connection up, and the session goes on from the new address.
#[tokio::test(start_paused = true)]
async fn another_address_behind_a_cut_is_not_noticed() {
    let addresses = ["198.51.100.1:1", "198.51.100.2:2"];
    assert_eq!(unnoticed("another address behind a cut of 60 s", &addresses, 60).await, 2);
}
