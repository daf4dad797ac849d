//! Where on this host a piece or a block may be found: an index on disk over the images that lie
//! here, for more of them than memory holds.
//!
//! ```text
//! builder --> spilled runs --+
//!                            +--> merge --> one run --> manifest names it --> snapshot --> look-up
//! runs of like size ---------+
//! ```
//! A run is a file of sorted [`Entry`]s in pages of 4 KiB, each with its check, and one key in a page is
//! kept in memory. The manifest names the runs that count and the images that they tell of.
//! `FORMAT.md` has both byte by byte.
//!
//! Invariant: an answer is a hint. Entries have 64 bits of a hash and images change behind the index's
//! back, so whoever follows one hashes what is there. Whatever a crash or damage leaves, what is read is
//! what was once written: the rest is missed, and learnt again from the images.

mod build;
mod check;
mod format;
mod merge;
mod run;
mod store;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

pub use build::Builder;
pub use check::Checked;
pub use format::{
    Entry, Indexed, Manifest, ManifestError, RunFacts, decode_page, decode_run_header,
};
pub use store::{Places, Snapshot, Summary, Wanted};

use crate::{
    blocks::{BLOCK_BYTES, ShortId},
    id::ChunkId,
};

/// Places that are kept for one hash in one run, and that a look-up gives: enough to survive a few images
/// being overwritten, few enough that a piece that is everywhere does not fill the index.
pub const MAX_PLACES: usize = 4;

/// Images that one index tells of, at most.
pub const MAX_IMAGES: usize = 1 << 15;

/// Where a piece or a block may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The image, by the index's numbering: [`Snapshot::image`] knows it.
    pub image: u16,
    /// The first byte in the image as a guest sees it: a multiple of [`BLOCK_BYTES`].
    pub offset: u64,
    /// How many blocks the piece has; 0 if this is a sampled block, and no piece.
    pub blocks: u8,
}

/// The hash by which a piece is looked for.
pub fn piece_key(id: &ChunkId) -> u64 {
    u64::from_le_bytes(*id.as_bytes().first_chunk().expect("an id is longer than a key"))
}

/// The hash by which a sampled block is looked for.
pub fn block_key(id: ShortId) -> u64 {
    u64::from_le_bytes(*id.as_bytes())
}

/// The blocks of `bytes` bytes.
fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES as u64)
}

/// An index that could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum PlacesError {
    /// The file system refused. What the index held before it still holds.
    #[error("the index of images, {path}: {doing}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another release wrote it. It was left as it is.
    #[error("the index of images, {path}: {reason}: remove the folder to start anew")]
    Unreadable {
        /// Its list of runs.
        path: PathBuf,
        /// What is wrong with it.
        reason: ManifestError,
    },
    /// There is no number left for another image.
    #[error("the index tells of {MAX_IMAGES} images already, and takes no more")]
    TooManyImages,
}

fn io_error(
    path: &std::path::Path,
    doing: &'static str,
) -> impl FnOnce(io::Error) -> PlacesError + use<> {
    let path = path.to_owned();
    move |source| PlacesError::Io { path, doing, source }
}
