//! What was written to an image, piece by piece: the way back to where a seed stopped, and the
//! list by which later migrations find their pieces and blocks in this image.
//!
//! [`Recipe`] is the list in memory, [`RecipeLog`] the file that it is rebuilt from.
//!
//! Invariant: a recipe claims, it never vouches. A crash may take the image's bytes and leave the
//! log's, damage may cut records that superseded others. So bytes are hashed again whenever an
//! entry is used, unless [`Recipe::complete`] holds and the image's identity still equals it: that
//! mark is always the last thing in the log, and made only after both files were synced.

mod claims;
mod format;
mod log;

use std::{
    collections::BTreeMap, fs::Metadata, io, io::Read, ops::Range, os::unix::fs::MetadataExt,
};

pub use claims::{Claim, Claims};
pub use format::HeaderError;
use format::{HEADER_BYTES, Record};
pub use log::{RecipeError, RecipeLog};

use crate::{
    blocks::{BLOCK_BYTES, MAX_PIECE_BYTES, ShortId},
    grains::GrainId,
    id::ChunkId,
};

/// The most pieces, samples and runs of zeros that one recipe may list: 2 TiB of data. A piece takes
/// about 65 bytes in memory, the others 30.
pub const MAX_RECIPE_ENTRIES: usize = 1 << 26;

/// Samples of grains that one recipe lists: those of 40 GiB of data, in about 100 MiB of memory.
pub const MAX_GRAINS: usize = 1 << 22;

/// One piece at its place in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecipeEntry {
    /// First byte in the image as the guest sees it.
    pub offset: u64,
    /// Length in bytes, 1 to [`MAX_PIECE_BYTES`].
    pub len: u32,
    /// The bytes' [`piece_id`](crate::blocks::piece_id).
    pub id: ChunkId,
}

/// A block at its place in an image, one of those that are kept in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sample {
    /// First byte in the image as the guest sees it.
    pub offset: u64,
    /// The block's short id.
    pub id: ShortId,
}

/// A grain at its place in an image, one of those by which similar stretches are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GrainSample {
    /// First byte in the image as the guest sees it.
    pub offset: u64,
    /// The grain's id.
    pub id: GrainId,
}

impl RecipeEntry {
    /// The bytes that it covers; `None` if no image reaches that far, or no piece is that long.
    pub fn range(&self) -> Option<Range<u64>> {
        let end = self.offset.checked_add(u64::from(self.len))?;
        (self.len > 0 && self.len <= MAX_PIECE_BYTES).then_some(self.offset..end)
    }

    /// Its blocks.
    pub fn blocks(&self) -> usize {
        (self.len as usize).div_ceil(BLOCK_BYTES)
    }

    /// Bytes of one of its blocks: only the last of a disk may be short.
    pub fn block_len(&self, block: usize) -> usize {
        BLOCK_BYTES.min(self.len as usize - block * BLOCK_BYTES)
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

/// Which pieces an image holds, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    image_bytes: u64,
    live: BTreeMap<u64, (u32, ChunkId)>,
    /// From where to where zeros are known to be.
    zeros: BTreeMap<u64, u64>,
    samples: BTreeMap<u64, ShortId>,
    grains: BTreeMap<u64, GrainId>,
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
    /// It lists more than is accepted.
    #[error("it lists more than {MAX_RECIPE_ENTRIES} pieces")]
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
            if recipe.items() > MAX_RECIPE_ENTRIES {
                return Err(ReadError::TooManyEntries);
            }
        }
        Ok(recipe)
    }

    fn empty(image_bytes: u64) -> Self {
        Self {
            image_bytes,
            live: BTreeMap::new(),
            zeros: BTreeMap::new(),
            samples: BTreeMap::new(),
            grains: BTreeMap::new(),
            complete: None,
            logged: 0,
            log_bytes: HEADER_BYTES as u64,
        }
    }

    /// Size of the image as its guest sees it.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// The pieces by ascending offset, without overlap.
    pub fn entries(&self) -> impl Iterator<Item = RecipeEntry> + '_ {
        self.live.iter().map(|(offset, (len, id))| RecipeEntry {
            offset: *offset,
            len: *len,
            id: *id,
        })
    }

    /// The blocks that belong into the index, by ascending offset.
    pub fn samples(&self) -> impl Iterator<Item = Sample> + '_ {
        self.samples.iter().map(|(offset, id)| Sample { offset: *offset, id: *id })
    }

    /// The samples of grains, by ascending offset.
    pub fn grains(&self) -> impl Iterator<Item = GrainSample> + '_ {
        self.grains.iter().map(|(offset, id)| GrainSample { offset: *offset, id: *id })
    }

    /// Those of them that begin in a stretch.
    pub fn grains_in(&self, stretch: Range<u64>) -> impl Iterator<Item = GrainSample> + '_ {
        self.grains.range(stretch).map(|(offset, id)| GrainSample { offset: *offset, id: *id })
    }

    /// Where zeros are known to be, ascending, apart from each other.
    pub fn zeros(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.zeros.iter().map(|(start, end)| *start..*end)
    }

    /// The piece that begins at this byte.
    pub fn at(&self, offset: u64) -> Option<RecipeEntry> {
        self.live.get(&offset).map(|(len, id)| RecipeEntry { offset, len: *len, id: *id })
    }

    /// The pieces of a stretch, if all of it is known: every byte is of a piece that lies within it,
    /// or a zero.
    pub fn known(&self, stretch: &Range<u64>) -> Option<Vec<RecipeEntry>> {
        let mut at = stretch.start;
        let mut pieces = Vec::new();
        while at < stretch.end {
            if let Some((len, id)) = self.live.get(&at) {
                pieces.push(RecipeEntry { offset: at, len: *len, id: *id });
                at += u64::from(*len);
            } else {
                let (_, end) = self.zeros.range(..=at).next_back().filter(|(_, end)| **end > at)?;
                at = stretch.end.min(*end);
            }
        }
        (at == stretch.end).then_some(pieces)
    }

    /// How many pieces there are.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Pieces, samples of blocks and of grains, and runs of zeros.
    fn items(&self) -> usize {
        self.live.len() + self.zeros.len() + self.samples.len() + self.grains.len()
    }

    /// Whether nothing is known of the image.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// The mark, if nothing was appended after it. The caller compares the identity.
    pub fn complete(&self) -> Option<Completed> {
        self.complete
    }

    fn admits(&self, record: &Record) -> bool {
        admits(self.image_bytes, record)
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
            Record::Zeros(ranges) => {
                for range in ranges {
                    self.forget(range.clone());
                    self.add_zeros(range.clone());
                }
                self.logged += ranges.len() as u64;
            }
            Record::Samples(samples) => {
                self.samples.extend(samples.iter().map(|sample| (sample.offset, sample.id)));
                self.logged += samples.len() as u64;
            }
            Record::Grains(grains) => {
                let room = MAX_GRAINS.saturating_sub(self.grains.len());
                self.grains.extend(grains.iter().take(room).map(|grain| (grain.offset, grain.id)));
                self.logged += grains.len() as u64;
            }
            Record::Complete(completed) => self.complete = Some(*completed),
        }
        self.log_bytes += bytes;
    }

    /// Takes in zeros where nothing is known, joined with those beside them.
    fn add_zeros(&mut self, mut range: Range<u64>) {
        if let Some(end) = self.zeros.remove(&range.end) {
            range.end = end;
        }
        match self.zeros.range_mut(..range.start).next_back() {
            Some((_, end)) if *end == range.start => *end = range.end,
            _ => {
                self.zeros.insert(range.start, range.end);
            }
        }
    }

    /// Drops every piece that has a byte in `range`, because part of a piece is not that piece; the
    /// samples in it; and what it has of zeros.
    fn forget(&mut self, range: Range<u64>) {
        self.forget_zeros(&range);
        let samples: Vec<u64> =
            self.samples.range(range.clone()).map(|(offset, _)| *offset).collect();
        for offset in samples {
            self.samples.remove(&offset);
        }
        let grains: Vec<u64> =
            self.grains.range(range.clone()).map(|(offset, _)| *offset).collect();
        for offset in grains {
            self.grains.remove(&offset);
        }
        let reach = u64::from(MAX_PIECE_BYTES);
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

    fn forget_zeros(&mut self, range: &Range<u64>) {
        let touched: Vec<(u64, u64)> = self
            .zeros
            .range(..range.end)
            .rev()
            .take_while(|(_, end)| **end > range.start)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touched {
            self.zeros.remove(&start);
            if start < range.start {
                self.zeros.insert(start, range.start);
            }
            if end > range.end {
                self.zeros.insert(range.end, end);
            }
        }
    }
}

/// Whether everything that a record names lies within an image of `image_bytes`.
fn admits(image_bytes: u64, record: &Record) -> bool {
    let within = |range: &Range<u64>| range.start < range.end && range.end <= image_bytes;
    match record {
        Record::Entries(entries) => {
            entries.iter().all(|entry| entry.range().is_some_and(|range| within(&range)))
        }
        Record::Samples(samples) => samples.iter().all(|sample| sample.offset < image_bytes),
        Record::Grains(grains) => grains.iter().all(|grain| grain.offset < image_bytes),
        Record::Void(ranges) | Record::Zeros(ranges) => ranges.iter().all(within),
        Record::Complete(_) => true,
    }
}
