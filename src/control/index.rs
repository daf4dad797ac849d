//! What is said about the index of images.
//!
//! Invariant: as for all messages: plain values, and a field is added, never renamed.

use serde::{Deserialize, Serialize};

/// What is to be done with the index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexRequest {
    /// Tell what there is.
    Show,
    /// Take images in that it does not know as they are, and drop those that are gone.
    Build {
        /// Pools by name, or images by path; everything in all pools if empty.
        subjects: Vec<String>,
    },
    /// Read all of it, and put right what is damaged.
    Check,
}

/// How far the work on the index is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexProgress {
    /// The image that is being read; empty while the index itself is.
    pub image: String,
    /// Bytes of it (of an image: data, not holes), or entries, that were read.
    pub read: u64,
    /// Bytes of the image, or entries of the index.
    pub total: u64,
}

/// How an image of the index is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexedState {
    /// As it was when it was taken in.
    Current,
    /// Written to since: what the index says of it are guesses.
    Changed,
    /// Not there any more.
    Gone,
    /// Damage has cost some of its entries.
    Partial,
}

/// An image that the index tells of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexedImage {
    /// Where it lies.
    pub path: String,
    /// Its size as a guest sees it.
    pub bytes: u64,
    /// Its entries.
    pub entries: u64,
    /// How it is now.
    pub state: IndexedState,
    /// Whether it was read; if not, its record was.
    pub was_read: bool,
}

/// What work on the index came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexWork {
    /// Images that were read.
    pub images_read: u64,
    /// Bytes that were read of them.
    pub bytes_read: u64,
    /// Images of which the record was taken in.
    pub records_taken: u64,
    /// Images that were in the index as they are.
    pub unchanged: u64,
    /// Images that were dropped because they are gone.
    pub dropped: u64,
    /// Pages of the index that were damaged, and are no longer in it.
    pub damaged_pages: u64,
    /// Images that could not be read, and why.
    pub failed: Vec<String>,
}

/// The index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexSummary {
    /// Its images.
    pub images: Vec<IndexedImage>,
    /// Entries.
    pub entries: u64,
    /// Entries of images that were changed or are gone, or were dropped and wait for a merge.
    pub stale_entries: u64,
    /// Runs: each costs a look-up a page.
    pub runs: u64,
    /// Runs in which damage was met.
    pub damaged_runs: u64,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// Memory that it takes.
    pub memory_bytes: u64,
    /// What was done, if anything was to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<IndexWork>,
}
