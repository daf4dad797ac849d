//! The recipe file's bytes: pure. `FORMAT.md` describes the same layout in prose.
//!
//! Invariant: a record counts only if its check matches, and the check covers where in the file it
//! stands. Whatever a crash, a full disk or an earlier life of the file left behind the last good
//! record is therefore recognised as not being one.

use std::io::{self, Read};
use std::ops::Range;

use crate::{
    blocks::ShortId,
    cursor::{Cursor, DecodeError},
    grains::GrainId,
    id::ChunkId,
    recipe::{Completed, GrainSample, ImageIdentity, RecipeEntry, Sample},
};

pub(super) const MAGIC: [u8; 8] = *b"LHRECIPE";
pub(super) const VERSION: u32 = 2;
pub(super) const HEADER_BYTES: usize = 64;

/// Items in one record: a record is read and checked as a whole, in 180 KiB of memory at most.
pub(super) const MAX_RECORD_ITEMS: usize = 4096;

const HEADER_CHECKED: usize = 32;
const HEAD_BYTES: usize = 8;
const CHECK_BYTES: usize = 16;
const ENTRY_BYTES: usize = 8 + 4 + ChunkId::BYTES;
const RANGE_BYTES: usize = 8 + 8;
const SAMPLE_BYTES: usize = 8 + ShortId::BYTES;
const GRAIN_BYTES: usize = 8 + GrainId::BYTES;
const COMPLETE_BYTES: usize = 8 + 8 + 8 + 8;

const KIND_ENTRIES: u8 = 1;
const KIND_VOID: u8 = 2;
const KIND_COMPLETE: u8 = 3;
const KIND_ZEROS: u8 = 4;
const KIND_SAMPLES: u8 = 5;
const KIND_GRAINS: u8 = 6;

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    Entries(Vec<RecipeEntry>),
    Void(Vec<Range<u64>>),
    Zeros(Vec<Range<u64>>),
    Samples(Vec<Sample>),
    Grains(Vec<GrainSample>),
    Complete(Completed),
}

/// Why a file's first bytes are not a recipe's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another kind of file, or one whose first bytes were damaged.
    #[error("it does not begin like a recipe")]
    NotARecipe,
    /// A format that this release does not know.
    #[error("its format is version {found}, this release reads version {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
}

pub(super) fn encode_header(image_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&image_bytes.to_le_bytes());
    let check = *blake3::hash(&header[..HEADER_CHECKED]).as_bytes();
    header[HEADER_CHECKED..].copy_from_slice(&check);
    header
}

/// The image's size.
pub(super) fn decode_header(header: &[u8; HEADER_BYTES]) -> Result<u64, HeaderError> {
    let (checked, check) = header.split_at(HEADER_CHECKED);
    if checked[..8] != MAGIC || blake3::hash(checked).as_bytes() != check {
        return Err(HeaderError::NotARecipe);
    }
    let mut cursor = Cursor::new(&checked[8..]);
    let fields = (|| Ok((cursor.u32("version")?, cursor.u32("reserved")?, cursor.u64("size")?)))();
    let (version, _, image_bytes) = fields.map_err(|_: DecodeError| HeaderError::NotARecipe)?;
    if version != VERSION {
        return Err(HeaderError::Version { found: version });
    }
    Ok(image_bytes)
}

/// The bytes of a record that begins at byte `at` of the file.
pub(super) fn encode_record(at: u64, record: &Record) -> Vec<u8> {
    let (kind, count) = match record {
        Record::Entries(entries) => (KIND_ENTRIES, entries.len()),
        Record::Void(ranges) => (KIND_VOID, ranges.len()),
        Record::Zeros(ranges) => (KIND_ZEROS, ranges.len()),
        Record::Samples(samples) => (KIND_SAMPLES, samples.len()),
        Record::Grains(grains) => (KIND_GRAINS, grains.len()),
        Record::Complete(_) => (KIND_COMPLETE, 1),
    };
    assert!((1..=MAX_RECORD_ITEMS).contains(&count), "the log splits what it appends");
    let mut out = vec![kind, 0, 0, 0];
    out.extend_from_slice(&(count as u32).to_le_bytes());
    match record {
        Record::Entries(entries) => {
            for entry in entries {
                out.extend_from_slice(&entry.offset.to_le_bytes());
                out.extend_from_slice(&entry.len.to_le_bytes());
                out.extend_from_slice(entry.id.as_bytes());
            }
        }
        Record::Samples(samples) => {
            for sample in samples {
                out.extend_from_slice(&sample.offset.to_le_bytes());
                out.extend_from_slice(sample.id.as_bytes());
            }
        }
        Record::Grains(grains) => {
            for grain in grains {
                out.extend_from_slice(&grain.offset.to_le_bytes());
                out.extend_from_slice(grain.id.as_bytes());
            }
        }
        Record::Void(ranges) | Record::Zeros(ranges) => {
            for range in ranges {
                out.extend_from_slice(&range.start.to_le_bytes());
                out.extend_from_slice(&(range.end - range.start).to_le_bytes());
            }
        }
        Record::Complete(completed) => {
            out.extend_from_slice(&completed.generation.to_le_bytes());
            out.extend_from_slice(&completed.image.size.to_le_bytes());
            out.extend_from_slice(&completed.image.mtime_ns.to_le_bytes());
            out.extend_from_slice(&completed.image.inode.to_le_bytes());
        }
    }
    let check = check(at, &out);
    out.extend_from_slice(&check);
    out
}

/// Reads the record at byte `at`, and says how long it is. `None`: there is none, or none that can
/// be believed, and what follows `at` is not part of the log.
pub(super) fn read_record(input: &mut impl Read, at: u64) -> io::Result<Option<(Record, u64)>> {
    let mut bytes = vec![0; HEAD_BYTES];
    if !fill(input, &mut bytes)? {
        return Ok(None);
    }
    let Ok((kind, count)) = decode_head(&bytes) else {
        return Ok(None);
    };
    let item_bytes = match kind {
        KIND_ENTRIES => ENTRY_BYTES,
        KIND_VOID | KIND_ZEROS => RANGE_BYTES,
        KIND_SAMPLES => SAMPLE_BYTES,
        KIND_GRAINS => GRAIN_BYTES,
        _ => COMPLETE_BYTES,
    };
    // Bounded: `decode_head` checked kind and count.
    let checked = HEAD_BYTES + count * item_bytes;
    bytes.resize(checked + CHECK_BYTES, 0);
    if !fill(input, &mut bytes[HEAD_BYTES..])? || check(at, &bytes[..checked]) != bytes[checked..] {
        return Ok(None);
    }
    let len = bytes.len() as u64;
    Ok(decode_body(kind, count, &bytes[HEAD_BYTES..checked]).ok().map(|record| (record, len)))
}

fn decode_head(head: &[u8]) -> Result<(u8, usize), DecodeError> {
    let mut cursor = Cursor::new(head);
    let kind = cursor.u8("kind")?;
    let reserved = cursor.array::<3>("reserved")?;
    let count = cursor.u32("count")? as usize;
    let most = match kind {
        KIND_ENTRIES | KIND_VOID | KIND_ZEROS | KIND_SAMPLES | KIND_GRAINS => MAX_RECORD_ITEMS,
        KIND_COMPLETE => 1,
        _ => return Err(DecodeError::Invalid { what: "kind" }),
    };
    if reserved != [0; 3] || !(1..=most).contains(&count) {
        return Err(DecodeError::Invalid { what: "count" });
    }
    Ok((kind, count))
}

fn decode_body(kind: u8, count: usize, body: &[u8]) -> Result<Record, DecodeError> {
    let mut cursor = Cursor::new(body);
    let record = match kind {
        KIND_ENTRIES => {
            let mut entries = Vec::with_capacity(count);
            for _ in 0..count {
                let offset = cursor.u64("offset")?;
                let len = cursor.u32("length")?;
                let id = ChunkId::from_bytes(cursor.array("id")?);
                entries.push(RecipeEntry { offset, len, id });
            }
            Record::Entries(entries)
        }
        KIND_SAMPLES => {
            let mut samples = Vec::with_capacity(count);
            for _ in 0..count {
                let offset = cursor.u64("offset")?;
                samples.push(Sample { offset, id: ShortId::from_bytes(cursor.array("id")?) });
            }
            Record::Samples(samples)
        }
        KIND_GRAINS => {
            let mut grains = Vec::with_capacity(count);
            for _ in 0..count {
                let offset = cursor.u64("offset")?;
                grains.push(GrainSample { offset, id: GrainId::from_bytes(cursor.array("id")?) });
            }
            Record::Grains(grains)
        }
        KIND_VOID | KIND_ZEROS => {
            let mut ranges = Vec::with_capacity(count);
            for _ in 0..count {
                let start = cursor.u64("offset")?;
                let len = cursor.u64("length")?;
                let end = start.checked_add(len).ok_or(DecodeError::Invalid { what: "length" })?;
                ranges.push(start..end);
            }
            if kind == KIND_VOID { Record::Void(ranges) } else { Record::Zeros(ranges) }
        }
        _ => Record::Complete(Completed {
            generation: cursor.u64("generation")?,
            image: ImageIdentity {
                size: cursor.u64("size")?,
                mtime_ns: cursor.u64("time")?.cast_signed(),
                inode: cursor.u64("inode")?,
            },
        }),
    };
    cursor.finish()?;
    Ok(record)
}

fn check(at: u64, record: &[u8]) -> [u8; CHECK_BYTES] {
    let hash = blake3::Hasher::new().update(&at.to_le_bytes()).update(record).finalize();
    *hash.as_bytes().first_chunk().expect("a check is shorter than a hash")
}

/// Fills `buffer`; `false` if the input ends before.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match input.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
