//! What was written to an image, chunk by chunk: the way back to where a seed stopped, and the
//! list by which later migrations find their chunks in this image.
//!
//! [`Recipe`] is the list in memory, [`RecipeLog`] the file that it is rebuilt from.
//!
//! Invariant: a recipe claims, it never vouches. A crash may take the image's bytes and leave the
//! log's, damage may cut records that superseded others. So bytes are hashed again whenever an
//! entry is used, unless [`Recipe::complete`] holds and the image's identity still equals it: that
//! mark is always the last thing in the log, and made only after both files were synced.

mod format;
mod log;

use std::{
    collections::BTreeMap, fs::Metadata, io, io::Read, ops::Range, os::unix::fs::MetadataExt,
};

pub use format::HeaderError;
use format::{HEADER_BYTES, Record};
pub use log::{RecipeError, RecipeLog};

use crate::{chunker::MAX_CHUNK_BYTES, id::ChunkId};

/// The most chunks that one recipe may list: 4 TiB of the smallest average in use. Each takes
/// about 65 bytes in memory.
pub const MAX_RECIPE_ENTRIES: usize = 1 << 26;

/// One chunk at its place in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecipeEntry {
    /// First byte in the image as the guest sees it.
    pub offset: u64,
    /// Length in bytes, 1 to [`MAX_CHUNK_BYTES`].
    pub len: u32,
    /// The bytes' hash.
    pub id: ChunkId,
}

impl RecipeEntry {
    /// The bytes that it covers; `None` if no image reaches that far, or no chunk is that long.
    pub fn range(&self) -> Option<Range<u64>> {
        let end = self.offset.checked_add(u64::from(self.len))?;
        (self.len > 0 && self.len <= MAX_CHUNK_BYTES).then_some(self.offset..end)
    }
}

/// By what an image file is recognised as untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageIdentity {
    /// Size of the file in bytes (of a qcow2 image: not what the guest sees).
    pub size: u64,
    /// When it was last modified, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Its inode: a file that was put in its place has another.
    pub inode: u64,
}

impl ImageIdentity {
    /// The identity of a file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        let seconds = metadata.mtime().saturating_mul(1_000_000_000);
        Self {
            size: metadata.size(),
            mtime_ns: seconds.saturating_add(metadata.mtime_nsec()),
            inode: metadata.ino(),
        }
    }
}

/// The mark that says: the image held exactly what the recipe lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// The caller's number for this state of the disk.
    pub generation: u64,
    /// The image file as it was then.
    pub image: ImageIdentity,
}

/// Which chunks an image holds, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    image_bytes: u64,
    live: BTreeMap<u64, (u32, ChunkId)>,
    complete: Option<Completed>,
    /// Items in the log that `live` was made from, superseded ones included.
    logged: u64,
    /// Bytes of the log up to the end of its last good record.
    log_bytes: u64,
}

/// A log that no recipe can be made of.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The bytes cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// Not a log, or not one of ours.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It lists more chunks than are accepted.
    #[error("it lists more than {MAX_RECIPE_ENTRIES} chunks")]
    TooManyEntries,
}

impl Recipe {
    /// Reads a log up to its end or its first record that cannot be believed.
    pub fn read(mut input: impl Read) -> Result<Self, ReadError> {
        let mut header = [0; HEADER_BYTES];
        input.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Header(HeaderError::NotARecipe),
            _ => ReadError::Io(error),
        })?;
        let mut recipe = Self::empty(format::decode_header(&header)?);
        while let Some((record, bytes)) = format::read_record(&mut input, recipe.log_bytes)? {
            if !recipe.admits(&record) {
                break;
            }
            recipe.apply(&record, bytes);
            if recipe.live.len() > MAX_RECIPE_ENTRIES {
                return Err(ReadError::TooManyEntries);
            }
        }
        Ok(recipe)
    }

    fn empty(image_bytes: u64) -> Self {
        Self {
            image_bytes,
            live: BTreeMap::new(),
            complete: None,
            logged: 0,
            log_bytes: HEADER_BYTES as u64,
        }
    }

    /// Size of the image as its guest sees it.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// The chunks by ascending offset, without overlap.
    pub fn entries(&self) -> impl Iterator<Item = RecipeEntry> + '_ {
        self.live.iter().map(|(offset, (len, id))| RecipeEntry {
            offset: *offset,
            len: *len,
            id: *id,
        })
    }

    /// How many chunks there are.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether nothing is known of the image.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// The mark, if nothing was appended after it. The caller compares the identity.
    pub fn complete(&self) -> Option<Completed> {
        self.complete
    }

    /// Whether everything that a record names lies within the image.
    fn admits(&self, record: &Record) -> bool {
        match record {
            Record::Entries(entries) => entries
                .iter()
                .all(|entry| entry.range().is_some_and(|range| range.end <= self.image_bytes)),
            Record::Void(ranges) => {
                ranges.iter().all(|range| range.start < range.end && range.end <= self.image_bytes)
            }
            Record::Complete(_) => true,
        }
    }

    /// Takes in an admitted record of `bytes` bytes.
    fn apply(&mut self, record: &Record, bytes: u64) {
        self.complete = None;
        match record {
            Record::Entries(entries) => {
                for entry in entries {
                    self.forget(entry.offset..entry.offset + u64::from(entry.len));
                    self.live.insert(entry.offset, (entry.len, entry.id));
                }
                self.logged += entries.len() as u64;
            }
            Record::Void(ranges) => {
                ranges.iter().for_each(|range| self.forget(range.clone()));
                self.logged += ranges.len() as u64;
            }
            Record::Complete(completed) => self.complete = Some(*completed),
        }
        self.log_bytes += bytes;
    }

    /// Drops every entry that has a byte in `range`: part of a chunk is not that chunk.
    fn forget(&mut self, range: Range<u64>) {
        let reach = u64::from(MAX_CHUNK_BYTES);
        let stale: Vec<u64> = self
            .live
            .range(range.start.saturating_sub(reach)..range.end)
            .filter(|(offset, (len, _))| **offset + u64::from(*len) > range.start)
            .map(|(offset, _)| *offset)
            .collect();
        for offset in stale {
            self.live.remove(&offset);
        }
    }
}
