//! Who may talk to this agent.
//!
//! Invariant: the answer is asked for at every handshake and never remembered, so pairing and
//! unpairing take effect at the next connection without a restart.

use std::collections::BTreeSet;
use std::sync::RwLock;

use crate::fingerprint::Fingerprint;

/// The peers whose connections this agent accepts.
///
/// Called inside a handshake: it must answer from memory, at once.
pub trait Trust: Send + Sync {
    /// True if the operator has paired this agent with the agent named by `peer`.
    fn is_trusted(&self, peer: &Fingerprint) -> bool;
}

/// A set of trusted peers in memory, changeable while the agent runs.
#[derive(Debug, Default)]
pub struct TrustedPeers(RwLock<BTreeSet<Fingerprint>>);

impl TrustedPeers {
    /// A set of these peers.
    pub fn new(peers: impl IntoIterator<Item = Fingerprint>) -> Self {
        Self(RwLock::new(peers.into_iter().collect()))
    }

    /// Trusts `peer` from now on. False if it was trusted before.
    pub fn add(&self, peer: Fingerprint) -> bool {
        self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(peer)
    }

    /// Refuses new connections from `peer` from now on. False if it was not trusted.
    pub fn remove(&self, peer: &Fingerprint) -> bool {
        self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(peer)
    }
}

impl Trust for TrustedPeers {
    fn is_trusted(&self, peer: &Fingerprint) -> bool {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).contains(peer)
    }
}
