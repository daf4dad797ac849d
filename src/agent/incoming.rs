//! Sessions that peers open: each is handed to the mover.
//!
//! Invariant: only peers that the book knows now are served, and only so many sessions at a time.

use std::sync::Arc;
use std::time::Duration;

use longhaul_transport::{Endpoint, Session};
use tokio::task::JoinSet;

use super::cancel::{CancelReason, CancelToken};
use super::jobs::Mover;
use super::peers::PeerBook;

/// Sessions that are served at a time, over all peers: arriving seeds and migrations and questions.
const SESSIONS_MAX: usize = 64;

/// Serves sessions until the endpoint closes or `stopping`; then up to `wait` for the running ones.
pub(super) async fn serve(
    endpoint: Endpoint,
    peers: Arc<PeerBook>,
    mover: Arc<dyn Mover>,
    stopping: CancelToken,
    wait: Duration,
) {
    let mut running: JoinSet<()> = JoinSet::new();
    loop {
        let session = tokio::select! {
            session = endpoint.accept() => session,
            Some(_) = running.join_next() => continue,
            _ = stopping.cancelled() => break,
        };
        let Some(session) = session else { break };
        welcome(session, &peers, &mover, &stopping, &mut running);
    }
    stopping.cancel(CancelReason::Stopping);
    let all_ended = async { while running.join_next().await.is_some() {} };
    if tokio::time::timeout(wait, all_ended).await.is_err() {
        tracing::warn!("sessions with peers did not end in time and were cut");
    }
}

fn welcome(
    session: Session,
    peers: &PeerBook,
    mover: &Arc<dyn Mover>,
    stopping: &CancelToken,
    running: &mut JoinSet<()>,
) {
    let address = session.remote_addr();
    let Some(peer) = peers.by_fingerprint(&session.peer()) else {
        // It was removed between its handshake and now.
        tracing::warn!(fingerprint = %session.peer(), %address, "refused a peer that is no more");
        session.refuse("not paired any more");
        return;
    };
    if running.len() >= SESSIONS_MAX {
        tracing::warn!(peer = peer.name, %address, "refused a session: too many run");
        session.refuse("too many sessions run at this host, try again later");
        return;
    }
    tracing::info!(peer = peer.name, %address, "session");
    let (mover, stopping) = (Arc::clone(mover), stopping.clone());
    running.spawn(async move { mover.serve(session, peer, stopping).await });
}
