//! What lies in the pools and is of no use any more, as commands and agents say it.
//!
//! Invariant: as for all messages: plain values, and a field is added, never renamed.

use serde::{Deserialize, Serialize};

/// What is to be looked for, and whether it is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcRequest {
    /// Only what nothing was written to for so many seconds.
    pub older_s: u64,
    /// Remove it; otherwise it is only shown.
    #[serde(default)]
    pub go: bool,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcSummary {
    /// Each, by pool and name.
    pub garbage: Vec<Garbage>,
    /// Bytes on the disks of all that is gone now, or would be.
    pub bytes: u64,
    /// It was removed.
    pub removed: bool,
}

/// Something that is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// Where it lies.
    pub path: String,
    /// What it is.
    pub kind: GarbageKind,
    /// Bytes on the disk, with what belongs to it.
    pub bytes: u64,
    /// Seconds since it was written to.
    pub age_s: u64,
    /// Why it could not be removed, if that was tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stays: Option<String>,
}

/// Kinds of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GarbageKind {
    /// An image that a push or pull began and nobody has finished.
    Unfinished,
    /// The record of an image that is gone.
    Orphan,
}
