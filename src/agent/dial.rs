//! Sessions to peers, wherever the book says that they are now.
//!
//! Invariant: whoever is dialled proves to be the peer of that name, and what the session carries is
//! counted and capped.

use std::sync::Arc;

use async_trait::async_trait;
use longhaul_transport::{Endpoint, JobRate, Session};

use super::links::Links;
use super::peers::PeerBook;
use crate::control::chain;
use crate::migration::job::Dial;

/// What dialling takes.
#[derive(Clone)]
pub struct Phone {
    pub(crate) endpoint: Endpoint,
    pub(crate) peers: Arc<PeerBook>,
    pub(crate) links: Arc<Links>,
}

impl Phone {
    /// Dials `peer`, for sessions under `rate`.
    pub(crate) fn dialer(&self, peer: &str, rate: JobRate) -> Dialer {
        Dialer { phone: self.clone(), peer: peer.to_owned(), rate, background: false }
    }
}

/// Reaches one peer.
pub(crate) struct Dialer {
    phone: Phone,
    peer: String,
    rate: JobRate,
    background: bool,
}

impl Dialer {
    /// Its sessions take only what others leave of the link.
    pub(crate) fn in_background(self, background: bool) -> Self {
        Self { background, ..self }
    }

    /// The peer's name at this host.
    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Session, String> {
        let Phone { endpoint, peers, links } = &self.phone;
        let peer = peers.get(&self.peer).map_err(|problem| problem.what)?;
        let mut last = format!("{} has no address", peer.address);
        let found = tokio::net::lookup_host(&peer.address).await;
        for address in found.map_err(|error| format!("{}: {error}", peer.address))? {
            match endpoint.connect(address, peer.fingerprint).await {
                Ok(session) => {
                    session.set_rate(self.rate.clone());
                    session.set_background(self.background);
                    links.count(&self.peer, &session);
                    return Ok(session);
                }
                Err(error) => last = chain(&error),
            }
        }
        Err(last)
    }
}
