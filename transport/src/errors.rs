//! Why an endpoint cannot be opened, and why a peer cannot be reached.
//!
//! Invariant: each variant asks the operator for something else, and its text says for what.

use std::io;
use std::net::SocketAddr;

use thiserror::Error;

use crate::close::CloseReason;
use crate::endpoint::HANDSHAKE_TIMEOUT;
use crate::fingerprint::Fingerprint;
use crate::tls::TlsError;

/// Why an endpoint could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// The socket could not be opened.
    #[error("cannot listen on UDP {addr}")]
    Socket {
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The socket is open and cannot be used.
    #[error("cannot use the UDP socket")]
    Endpoint(#[source] io::Error),
    /// The identity cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why no session with a peer came about.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody answered in time.
    #[error(
        "no answer from {addr} within {} s: check that an agent runs there and that UDP passes \
         the firewalls",
        HANDSHAKE_TIMEOUT.as_secs()
    )]
    Unreachable {
        /// The peer's address.
        addr: SocketAddr,
    },
    /// Somebody else answered, or the peer's key was made anew.
    #[error(
        "the agent at {addr} has the key {presented}, expected was {expected}: if its key was made \
         anew, compare it there and pair again; else another machine answers at this address"
    )]
    WrongKey {
        /// The peer's address.
        addr: SocketAddr,
        /// The key that was asked for.
        expected: Fingerprint,
        /// The key of whoever answered.
        presented: Fingerprint,
    },
    /// The peer does not know this agent's key.
    #[error(
        "the agent at {addr} does not trust this one: run `longhaul pair` there with this agent's \
         fingerprint {ours}"
    )]
    NotPaired {
        /// The peer's address.
        addr: SocketAddr,
        /// This agent's key.
        ours: Fingerprint,
    },
    /// The two agents speak different protocols.
    #[error(
        "this agent speaks protocol version {ours}, the agent at {addr} speaks version {theirs}: \
         install the same release on both"
    )]
    Version {
        /// The peer's address.
        addr: SocketAddr,
        /// The version of this agent.
        ours: u16,
        /// The version of the peer.
        theirs: u16,
    },
    /// The peer has too much to do at the moment.
    #[error("the agent at {addr} has too many connections waiting: try again in some seconds")]
    Busy {
        /// The peer's address.
        addr: SocketAddr,
    },
    /// The peer ended the connection with words of its own.
    #[error("the agent at {addr} refused the connection: {reason}")]
    Refused {
        /// The peer's address.
        addr: SocketAddr,
        /// The peer's words.
        reason: String,
    },
    /// Whoever listens there is no agent.
    #[error("what answers at {addr} is no longhaul agent: {detail}")]
    NotAnAgent {
        /// The peer's address.
        addr: SocketAddr,
        /// What gave it away.
        detail: String,
    },
    /// The handshake failed in another way.
    #[error("cannot connect to {addr}: {reason}")]
    Failed {
        /// The peer's address.
        addr: SocketAddr,
        /// How it ended.
        reason: CloseReason,
    },
    /// The connection could not even be tried.
    #[error("cannot connect to {addr} from here")]
    Local {
        /// The peer's address.
        addr: SocketAddr,
        /// What stood in the way.
        #[source]
        source: quinn::ConnectError,
    },
    /// The identity cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ConnectError {
    /// True if the same call can succeed later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Busy { .. } => true,
            Self::Failed { reason, .. } => reason.is_retryable(),
            _ => false,
        }
    }
}
