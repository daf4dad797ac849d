//! Accepting: from a stranger's first packet to a session that waits for
//! [`Endpoint::accept`](crate::Endpoint::accept).
//!
//! Invariant: handshakes run side by side in bounded number and each for a bounded time, so no peer,
//! however slow or hostile, keeps another from being accepted; and who is turned away after it has
//! proved its key is told why.

use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{Connection, Incoming, RecvStream, SendStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};

use crate::close::CloseCode;
use crate::endpoint::{HANDSHAKE_TIMEOUT, MAX_PENDING_HANDSHAKES, Shared};
use crate::fingerprint::Fingerprint;
use crate::frame::Hello;
use crate::greeting::{self, GreetingError};
use crate::keeper::{Arrival, Registered, Role};
use crate::lanes;
use crate::pace::Place;
use crate::session::{Session, canonical};
use crate::tls::{self, Presented};

/// From this many handshakes on, a peer must first show that it receives at the address it sends from.
const RETRY_FROM: usize = MAX_PENDING_HANDSHAKES / 2;

/// Accepts until the endpoint closes. Every handshake is a task of its own.
pub(crate) async fn accept_all(shared: Arc<Shared>, sessions: mpsc::Sender<Session>) {
    let pending = Arc::new(Semaphore::new(MAX_PENDING_HANDSHAKES));
    let mut handshakes = tokio::task::JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = shared.quic.accept() => incoming,
            Some(_) = handshakes.join_next() => continue,
        };
        let Some(incoming) = incoming else { return };
        let Ok(place) = pending.clone().try_acquire_owned() else {
            tracing::debug!(peer = %incoming.remote_address(), "too many handshakes, one refused");
            incoming.refuse();
            continue;
        };
        let running = MAX_PENDING_HANDSHAKES - pending.available_permits();
        if running > RETRY_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
            // Fails only where no retry is allowed, which was just asked.
            let _ = incoming.retry();
            continue;
        }
        let (shared, sessions) = (shared.clone(), sessions.clone());
        handshakes.spawn(async move {
            accept_one(&shared, incoming, &sessions).await;
            drop(place);
        });
    }
}

/// A peer that has proved its key.
struct Met {
    connection: Connection,
    place: Arc<Place>,
    addr: SocketAddr,
    fingerprint: Fingerprint,
}

async fn accept_one(shared: &Shared, incoming: Incoming, sessions: &mpsc::Sender<Session>) {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let addr = canonical(incoming.remote_address());
    let met = match timeout_at(deadline, meet(shared, incoming)).await {
        Ok(Some(met)) => met,
        Ok(None) => return,
        Err(_) => {
            tracing::debug!(peer = %addr, "a handshake took too long");
            return;
        }
    };
    let Met { connection, fingerprint, .. } = &met;
    let Ok(greeted) = timeout_at(deadline, greet(shared, &met)).await else {
        tracing::warn!(%fingerprint, peer = %addr, "a paired agent did not greet in time");
        let why = format!("no whole greeting came within {} s", HANDSHAKE_TIMEOUT.as_secs());
        connection.close(CloseCode::Violation.value(), why.as_bytes());
        return;
    };
    let Some((registered, theirs, control)) = greeted else { return };
    // Room first: a session in the queue is one that will be taken.
    match timeout_at(deadline, sessions.reserve()).await {
        Ok(Ok(room)) => {
            let made = (met.connection, met.place);
            let role = Role::Listener(registered);
            room.send(shared.session(made, met.fingerprint, &theirs, control, role));
        }
        Ok(Err(_)) => connection.close(CloseCode::Shutdown.value(), b"the agent stops"),
        Err(_) => {
            tracing::warn!(%fingerprint, peer = %addr, "a session was not accepted in time");
            connection.close(CloseCode::Busy.value(), b"too many sessions wait to be accepted");
        }
    }
}

/// Has the peer prove its key.
async fn meet(shared: &Shared, incoming: Incoming) -> Option<Met> {
    let addr = canonical(incoming.remote_address());
    let presented = Presented::default();
    let crypto = match tls::server(&shared.identity, shared.trust.clone(), presented.clone()) {
        Ok(crypto) => crypto,
        Err(error) => {
            tracing::error!(peer = %addr, %error, "cannot answer a peer");
            incoming.refuse();
            return None;
        }
    };
    let mut config = shared.server.clone();
    config.crypto = Arc::new(crypto);
    let (connecting, place) = Place::of_new(|| incoming.accept_with(Arc::new(config)));
    let connected = match connecting {
        Ok(connecting) => connecting.await,
        Err(error) => Err(error),
    };
    let (connection, fingerprint) = match (connected, presented.get()) {
        (Ok(connection), Some(fingerprint)) => (connection, fingerprint),
        (Ok(connection), None) => {
            connection.close(CloseCode::Refused.value(), b"no certificate was seen");
            return None;
        }
        (Err(_), Some(fingerprint)) if !shared.trust.is_trusted(&fingerprint) => {
            tracing::warn!(
                %fingerprint,
                peer = %addr,
                "refused an agent that is not paired with this one; if it should be, run \
                 `longhaul pair` here with this fingerprint"
            );
            return None;
        }
        (Err(error), _) => {
            tracing::debug!(peer = %addr, %error, "a handshake failed");
            return None;
        }
    };
    Some(Met { connection, place, addr, fingerprint })
}

type Greeted = (Registered, Hello, (SendStream, RecvStream));

/// Greets a peer. `None` if there is no new session to accept: the peer has been told why, or goes on
/// with one that is here, or opens a lane of it.
async fn greet(shared: &Shared, met: &Met) -> Option<Greeted> {
    let Met { connection, fingerprint, addr, .. } = met;
    let heard = match greeting::hear(connection, &shared.hello).await {
        Ok(heard) => heard,
        Err(GreetingError::Version { theirs }) => {
            tracing::warn!(
                %fingerprint,
                peer = %addr,
                ours = shared.hello.protocol,
                theirs,
                "refused a paired agent that speaks another protocol version: install the same \
                 release on both"
            );
            return None;
        }
        Err(GreetingError::Lost(error)) => {
            tracing::debug!(%fingerprint, peer = %addr, %error, "a paired agent left before it greeted");
            return None;
        }
        Err(error) => {
            tracing::warn!(%fingerprint, peer = %addr, ?error, "a paired agent did not greet");
            return None;
        }
    };
    let (mut send, recv, theirs) = heard;
    let answer = shared.hello_of(theirs.session, None);
    if let Some(seen) = theirs.goes_on {
        let made = (connection.clone(), met.place.clone());
        let arrival = Arrival { made, control: (send, recv), seen, answer };
        let known = shared.registry.find(*fingerprint, theirs.session);
        if known.is_none_or(|session| session.try_send(arrival).is_err()) {
            connection.close(CloseCode::Forgotten.value(), b"this agent has no such session");
        }
        return None;
    }
    let main = match theirs.lane_of {
        None => None,
        Some(id) => {
            let main = shared.registry.session(*fingerprint, id);
            let Some(main) = main.filter(|main| main.lanes.has_room()) else {
                connection.close(CloseCode::Forgotten.value(), b"no session here wants this lane");
                return None;
            };
            Some(main)
        }
    };
    let Some(registered) = shared.registry.enter(*fingerprint, theirs.session) else {
        tracing::warn!(%fingerprint, peer = %addr, "a paired agent has too many sessions here");
        connection.close(CloseCode::Busy.value(), b"you have too many sessions here");
        return None;
    };
    if let Err(error) = greeting::answer(&mut send, &answer).await {
        tracing::debug!(%fingerprint, peer = %addr, ?error, "a paired agent left over the greeting");
        return None;
    }
    let Some(main) = main else { return Some((registered, theirs, (send, recv))) };
    let made = (connection.clone(), met.place.clone());
    if let Err(error) = lanes::begin(&main, made, (send, recv), Role::Listener(registered)) {
        tracing::warn!(%fingerprint, peer = %addr, %error, "no thread for a lane");
        connection.close(CloseCode::Busy.value(), b"no thread for this lane");
    }
    None
}
