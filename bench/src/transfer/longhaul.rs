//! A flow over this product's transport: batches of guest pages from four senders.
//!
//! Invariant: the transport is used as the product uses it, with its default settings.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use longhaul_transport::{Class, Endpoint, Identity, RateLimiter, Session, TrustedPeers, Tuning};
use tokio::task::JoinSet;

use super::meter::{LOOK_PERIOD, Meter, Stop, Supply, payload_block};
use super::{Answer, Order, Tool, ends};
use crate::netns::Side;

/// Size of a batch.
const BATCH_BYTES: usize = 1 << 20;
/// Batches that are offered side by side.
const SENDERS: usize = 4;

/// Makes the keys of both ends.
pub(super) fn prepare(folder: &Path) -> Result<()> {
    identities(folder).map(|_| ())
}

fn identities(folder: &Path) -> Result<[Identity; 2]> {
    Ok([Identity::load_or_create(&folder.join("a"))?, Identity::load_or_create(&folder.join("b"))?])
}

/// The endpoint of one side, and the key of the other.
fn endpoint(order: &Order) -> Result<(Endpoint, longhaul_transport::Fingerprint)> {
    let keys = identities(&order.folder)?;
    let [own, peer] = match order.side {
        Side::A => [&keys[0], &keys[1]],
        Side::B => [&keys[1], &keys[0]],
    };
    let trust = Arc::new(TrustedPeers::new([peer.fingerprint()]));
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    Ok((Endpoint::bind(any, own, trust, Tuning::default())?, peer.fingerprint()))
}

/// Sends until there is nothing more to offer and the peer has it all; gives the packets whose
/// content was sent again.
pub(super) async fn send(order: &Order, supply: &Arc<Supply>) -> Result<u64> {
    let (endpoint, peer) = endpoint(order)?;
    let address = SocketAddr::from((Side::B.address(), order.port));
    let session = endpoint.connect(address, peer).await?;
    session.set_background(order.tool == Tool::LonghaulBackground);
    let lanes = match order.tool {
        Tool::Longhaul2 => 1,
        Tool::Longhaul4 => 3,
        _ => 0,
    };
    for _ in 0..lanes {
        session.widen().await?;
    }
    let job = RateLimiter::new().job();
    if !order.caps.is_empty() {
        job.set_job(order.caps.first());
        session.set_rate(job.clone());
    }
    supply.begin();
    let done = tokio::select! {
        done = send_all(&session, supply) => done,
        () = order.caps.follow(&job) => Ok(()),
        () = supply.cut_short() => Ok(()),
    };
    let repeated = session.stats().lost_packets;
    session.close("all is said");
    endpoint.close().await;
    done.map(|()| repeated)
}

async fn send_all(session: &Session, supply: &Arc<Supply>) -> Result<()> {
    let block = payload_block(BATCH_BYTES);
    let mut senders = JoinSet::new();
    for _ in 0..SENDERS {
        let (session, supply, block) = (session.clone(), supply.clone(), block.clone());
        senders.spawn(async move {
            loop {
                let bytes = supply.take(BATCH_BYTES);
                if bytes == 0 {
                    return Ok(());
                }
                session.send_batch(Class::Pages, b"", vec![block.slice(..bytes)]).await?;
            }
        });
    }
    while let Some(sender) = senders.join_next().await {
        let sent: Result<(), longhaul_transport::SendError> =
            sender.context("a sender panicked")?;
        sent?;
    }
    loop {
        let pages = session.stats().class(Class::Pages);
        if pages.acked == pages.sent {
            return Ok(());
        }
        if let Some(reason) = session.close_reason() {
            anyhow::bail!("the session ended: {reason}");
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}

/// Receives until the peer closes the session.
pub(super) async fn receive(order: &Order, meter: &Arc<Meter>, stop: &Stop) -> Result<()> {
    let (endpoint, _) = endpoint(order)?;
    ends::say(&Answer::Ready { port: endpoint.local_addr().port() })?;
    let session = endpoint.accept().await.context("the endpoint closed")?;
    meter.begin();
    let receiving = async {
        while let Ok(batch) = session.recv_batch().await {
            meter.add(batch.body.len());
        }
    };
    let counting = async {
        loop {
            // Batches arrive many at a time: what the link gave is seen by its bytes.
            meter.set_wire(session.stats().wire_bytes_received);
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    };
    tokio::select! {
        () = receiving => {}
        () = counting => {}
        () = stop.wait() => {}
    }
    meter.set_wire(session.stats().wire_bytes_received);
    Ok(())
}
