//! Why a session ended, in terms that decide what to do next.
//!
//! Invariant: every way in which a connection can end maps to exactly one reason, and text from a
//! peer is cut and cleaned before anyone sees it.

use quinn::{ConnectionError, TransportErrorCode, VarInt};
use thiserror::Error;

use crate::tls::ALERT_ACCESS_DENIED;

/// Longest reason that is sent or taken from a peer, in characters.
const MAX_REASON: usize = 300;

/// Why one side closed, as a number on the wire (QUIC application error code).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum CloseCode {
    /// All is done.
    Done = 0,
    /// The agent stops, or gave the session up without a word.
    Shutdown = 1,
    /// The protocol versions differ.
    Version = 2,
    /// The other side broke the protocol.
    Violation = 3,
    /// Too many sessions wait to be accepted.
    Busy = 4,
    /// This side does not want to go on; the reason says why.
    Refused = 5,
    /// This side does not know the session that the other wants to go on with.
    Forgotten = 6,
    /// The session goes on over another connection.
    Replaced = 7,
}

impl CloseCode {
    pub(crate) fn value(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// This side closed it.
    #[error("this agent ended the session: {reason}")]
    Local {
        /// What was given as the reason.
        reason: String,
    },
    /// The peer closed it, with everything done.
    #[error("the peer ended the session: {reason}")]
    Clean {
        /// The peer's words.
        reason: String,
    },
    /// The peer closed it because it does not want to go on.
    #[error("the peer refused to go on: {reason}")]
    Refused {
        /// The peer's words.
        reason: String,
    },
    /// The peer's operator has not paired it with this agent's key.
    #[error("the peer does not trust this agent's key: run `longhaul pair` there")]
    NotPaired,
    /// The peer's agent stopped, or dropped the session before it was done.
    #[error("the peer's agent left before the session was done: {reason}")]
    Shutdown {
        /// The peer's words.
        reason: String,
    },
    /// Nothing was heard for the idle timeout, or the peer does not know the connection any more.
    #[error("the link to the peer is cut or the peer has restarted")]
    Cut,
    /// The link was cut, and where it was made again the peer did not know the session: its agent has
    /// restarted, or did not wait for long enough.
    #[error("the link was cut, and the peer's agent has restarted or given the session up since")]
    Forgotten,
    /// The peer broke the protocol above QUIC.
    #[error("the peer broke the protocol: {detail}")]
    Violation {
        /// What it did.
        detail: String,
    },
    /// QUIC gave up on either side.
    #[error("the QUIC connection failed: {detail}")]
    Transport {
        /// What QUIC said.
        detail: String,
    },
}

impl CloseReason {
    /// True if connecting again and going on from what is verified can help without anybody doing
    /// anything. QUIC's own failures count: one of them is a receiver that gives up on a stream
    /// with too many gaps, which a new connection cures.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Cut | Self::Forgotten | Self::Shutdown { .. } | Self::Transport { .. })
    }

    /// The reason in what QUIC reports. `local` is what this side gave when it closed.
    pub(crate) fn from_quic(error: &ConnectionError, local: Option<&Self>) -> Self {
        match error {
            ConnectionError::LocallyClosed => local.cloned().unwrap_or_else(|| Self::Local {
                reason: "the agent's endpoint was closed".to_owned(),
            }),
            ConnectionError::ApplicationClosed(close) => {
                let reason = readable(&close.reason);
                let is = |code: CloseCode| close.error_code == code.value();
                if is(CloseCode::Done) {
                    Self::Clean { reason }
                } else if is(CloseCode::Shutdown) || is(CloseCode::Busy) {
                    Self::Shutdown { reason }
                } else if is(CloseCode::Forgotten) {
                    Self::Forgotten
                } else if is(CloseCode::Replaced) {
                    // And then no other connection came.
                    Self::Cut
                } else {
                    Self::Refused { reason }
                }
            }
            ConnectionError::ConnectionClosed(close)
                if close.error_code == TransportErrorCode::crypto(ALERT_ACCESS_DENIED) =>
            {
                Self::NotPaired
            }
            ConnectionError::TimedOut | ConnectionError::Reset => Self::Cut,
            other => Self::Transport { detail: other.to_string() },
        }
    }
}

/// A peer's words, without what could garble a terminal or a log, and not longer than a sentence.
pub(crate) fn readable(reason: &[u8]) -> String {
    String::from_utf8_lossy(reason)
        .chars()
        .take(MAX_REASON)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Our own words, cut so that they fit into one packet.
pub(crate) fn short(reason: &str) -> String {
    reason.chars().take(MAX_REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(code: CloseCode, reason: &'static [u8]) -> CloseReason {
        let close = quinn::ApplicationClose { error_code: code.value(), reason: reason.into() };
        CloseReason::from_quic(&ConnectionError::ApplicationClosed(close), None)
    }

    #[test]
    fn what_can_be_tried_again_is_known() {
        assert!(CloseReason::from_quic(&ConnectionError::TimedOut, None).is_retryable());
        assert!(CloseReason::from_quic(&ConnectionError::Reset, None).is_retryable());
        assert!(closed(CloseCode::Shutdown, b"").is_retryable());
        assert!(!closed(CloseCode::Done, b"").is_retryable());
        assert!(!closed(CloseCode::Refused, b"").is_retryable());
        assert!(!closed(CloseCode::Version, b"").is_retryable());
    }

    #[test]
    fn a_peers_words_are_cleaned_and_cut() {
        let CloseReason::Clean { reason } = closed(CloseCode::Done, b"a\x1b[2Jb\xff\n") else {
            panic!("a clean close");
        };
        assert_eq!(reason, "a [2Jb\u{fffd} ");
        assert_eq!(readable(&[b'x'; 10_000]).len(), MAX_REASON);
    }
}
