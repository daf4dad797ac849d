//! What is said about an image that was compared with its record.
//!
//! Invariant: as for all messages: plain values, and a field is added, never renamed.

use serde::{Deserialize, Serialize};

/// An image beside its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifySummary {
    /// Where it lies.
    pub image: String,
    /// Its size as a guest sees it.
    pub bytes: u64,
    /// Bytes of which the record knows the hash.
    pub recorded_bytes: u64,
    /// Whether nobody wrote to the image since its record was completed: what differs then is damage.
    pub untouched: bool,
    /// Bytes that are not what the record says.
    pub differing_bytes: u64,
    /// Where the first of them are: first byte and length.
    pub differing: Vec<(u64, u64)>,
}
