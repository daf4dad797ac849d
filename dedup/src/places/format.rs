//! The bytes of the index's files: pure. `FORMAT.md` describes the same layout in prose.
//!
//! Invariant: a page counts only if its check matches, and the check covers which page of which run it is,
//! so no page of an earlier life of a file, or of another file, is taken for one of this.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

use super::{MAX_IMAGES, Place};
use crate::{
    blocks::{BLOCK_BYTES, MAX_PIECE_BLOCKS},
    cursor::{Cursor, DecodeError},
    recipe::ImageIdentity,
};

/// Bytes that are read and checked at once.
pub(super) const PAGE_BYTES: usize = 4096;
const CHECK_BYTES: usize = 16;
/// Entries in a page, the last one of a run left out.
pub(super) const PAGE_ENTRIES: usize = (PAGE_BYTES - CHECK_BYTES) / Entry::BYTES;
/// Keys in a page of the fence.
pub(super) const FENCE_KEYS: usize = (PAGE_BYTES - CHECK_BYTES) / 8;
/// Entries in one run, at most: 64 GiB of file, 128 MiB of fence.
pub(super) const MAX_RUN_ENTRIES: u64 = 1 << 32;

const RUN_MAGIC: [u8; 8] = *b"LHPLACES";
const RUN_VERSION: u32 = 1;
const RUN_HEADER_CHECKED: usize = 32;
const MANIFEST_MAGIC: [u8; 8] = *b"LHINDEX\n";
const MANIFEST_VERSION: u32 = 1;
const MANIFEST_CHECK_BYTES: usize = 32;
/// Runs that one manifest may name.
pub(super) const MAX_RUNS: usize = 256;
/// The longest path of an image, in bytes.
const MAX_PATH_BYTES: u32 = 4096;
/// The longest manifest that is read.
pub(super) const MAX_MANIFEST_BYTES: u64 = 64 << 20;

const PLACE_BITS: u32 = 40;
const BLOCKS_BITS: u32 = 8;

/// One hash and one place, 16 bytes. They sort by hash, then image, then place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// The first 8 bytes of the hash, little-endian.
    pub key: u64,
    value: u64,
}

impl Entry {
    /// Bytes in an entry.
    pub const BYTES: usize = 16;

    /// An entry; `None` for a place that is no block's, or beyond 4 PiB, or a piece that is too long.
    pub fn new(key: u64, place: Place) -> Option<Self> {
        let block = place.offset / BLOCK_BYTES as u64;
        let fits = place.offset.is_multiple_of(BLOCK_BYTES as u64)
            && block < 1 << PLACE_BITS
            && usize::from(place.blocks) <= MAX_PIECE_BLOCKS;
        let image = u64::from(place.image) << (PLACE_BITS + BLOCKS_BITS);
        let value = image | u64::from(place.blocks) << PLACE_BITS | block;
        fits.then_some(Self { key, value })
    }

    /// Where it points.
    pub fn place(self) -> Place {
        Place {
            image: self.image(),
            offset: (self.value & ((1 << PLACE_BITS) - 1)) * BLOCK_BYTES as u64,
            blocks: (self.value >> PLACE_BITS) as u8,
        }
    }

    pub(super) fn image(self) -> u16 {
        (self.value >> (PLACE_BITS + BLOCKS_BITS)) as u16
    }

    /// The same place of another image.
    pub(super) fn of_image(self, image: u16) -> Self {
        let low = self.value & ((1 << (PLACE_BITS + BLOCKS_BITS)) - 1);
        Self { key: self.key, value: u64::from(image) << (PLACE_BITS + BLOCKS_BITS) | low }
    }
}

pub(super) type Page = [u8; PAGE_BYTES];

fn check(run: u64, page: u64, content: &[u8]) -> [u8; CHECK_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&run.to_le_bytes()).update(&page.to_le_bytes()).update(content);
    *hasher.finalize().as_bytes().first_chunk().expect("a hash is longer")
}

fn seal(run: u64, number: u64, page: &mut Page) {
    let check = check(run, number, &page[CHECK_BYTES..]);
    page[..CHECK_BYTES].copy_from_slice(&check);
}

/// What a page of a run holds, if it is that page.
fn unseal(run: u64, number: u64, page: &Page) -> Option<&[u8]> {
    let (found, content) = page.split_at(CHECK_BYTES);
    (found == check(run, number, content)).then_some(content)
}

/// Entries in page `index` (from 0) of a run of `entries`.
pub(super) fn entries_in(entries: u64, index: u64) -> usize {
    let before = index.saturating_mul(PAGE_ENTRIES as u64);
    entries.saturating_sub(before).min(PAGE_ENTRIES as u64) as usize
}

/// Pages of entries in a run of `entries`.
pub(super) fn data_pages(entries: u64) -> u64 {
    entries.div_ceil(PAGE_ENTRIES as u64)
}

/// Pages of a run's file: the header's, those of entries, those of the fence.
pub(super) fn file_pages(entries: u64) -> u64 {
    let data = data_pages(entries);
    1 + data + data.div_ceil(FENCE_KEYS as u64)
}

/// Page `number` of run `run`'s file, with these entries.
pub(super) fn encode_page(run: u64, number: u64, entries: &[Entry]) -> Page {
    let mut page = [0; PAGE_BYTES];
    let slots = page[CHECK_BYTES..].chunks_exact_mut(Entry::BYTES);
    for (slot, entry) in slots.zip(entries) {
        slot[..8].copy_from_slice(&entry.key.to_le_bytes());
        slot[8..].copy_from_slice(&entry.value.to_le_bytes());
    }
    seal(run, number, &mut page);
    page
}

/// The first `count` entries of page `number` of run `run`'s file; `None` if it is damaged, or holds fewer.
pub fn decode_page(
    run: u64,
    number: u64,
    page: &[u8; 4096],
    count: usize,
) -> Option<impl ExactSizeIterator<Item = Entry> + Clone + '_> {
    let content = unseal(run, number, page)?;
    let (slots, _) = content.as_chunks::<{ Entry::BYTES }>();
    let entries = slots.get(..count)?.iter().map(|slot| {
        let (key, value) = slot.split_at(8);
        let number = |half: &[u8]| u64::from_le_bytes(*half.first_chunk().expect("half of 16"));
        Entry { key: number(key), value: number(value) }
    });
    Some(entries)
}

/// Page `number` of run `run`'s file, with these keys of the fence.
pub(super) fn encode_fence(run: u64, number: u64, keys: &[u64]) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (slot, key) in page[CHECK_BYTES..].chunks_exact_mut(8).zip(keys) {
        slot.copy_from_slice(&key.to_le_bytes());
    }
    seal(run, number, &mut page);
    page
}

/// The first `count` keys of a page of the fence; `None` if it is damaged.
pub(super) fn decode_fence(run: u64, number: u64, page: &Page, count: usize) -> Option<Vec<u64>> {
    let (keys, _) = unseal(run, number, page)?.as_chunks::<8>();
    Some(keys.get(..count)?.iter().map(|key| u64::from_le_bytes(*key)).collect())
}

/// The first page of a run's file.
pub(super) fn encode_run_header(run: u64, entries: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    page[..8].copy_from_slice(&RUN_MAGIC);
    page[8..12].copy_from_slice(&RUN_VERSION.to_le_bytes());
    page[16..24].copy_from_slice(&run.to_le_bytes());
    page[24..32].copy_from_slice(&entries.to_le_bytes());
    let check = *blake3::hash(&page[..RUN_HEADER_CHECKED]).as_bytes();
    page[RUN_HEADER_CHECKED..RUN_HEADER_CHECKED + CHECK_BYTES]
        .copy_from_slice(&check[..CHECK_BYTES]);
    page
}

/// Number and entries of a run, by the first page of its file; `None` if it is damaged, or of a version
/// that this release does not know.
pub fn decode_run_header(page: &[u8; 4096]) -> Option<(u64, u64)> {
    let (checked, rest) = page.split_at(RUN_HEADER_CHECKED);
    let good = checked[..8] == RUN_MAGIC
        && checked[8..12] == RUN_VERSION.to_le_bytes()
        && rest[..CHECK_BYTES] == blake3::hash(checked).as_bytes()[..CHECK_BYTES];
    let mut cursor = Cursor::new(&checked[16..]);
    let (run, entries) = (cursor.u64("run").ok()?, cursor.u64("entries").ok()?);
    (good && entries <= MAX_RUN_ENTRIES).then_some((run, entries))
}

/// An image that the index tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Indexed {
    /// Where it lies; empty if the index has dropped it and waits for a merge.
    pub path: PathBuf,
    /// Its size in bytes, as a guest sees it.
    pub bytes: u64,
    /// The file as it was when its entries were made.
    pub identity: ImageIdentity,
    /// The record beside it that its entries are from; `None` if the image was read.
    pub record: Option<ImageIdentity>,
    /// Whether everything that was found in it is in the index. Damage ends that.
    pub whole: bool,
}

impl Indexed {
    /// Whether its entries are only waiting to be left out of the next merge.
    pub fn is_dropped(&self) -> bool {
        self.path.as_os_str().is_empty()
    }
}

/// A run that the manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFacts {
    /// Its number: its file is named after it.
    pub id: u64,
    /// Its entries by image.
    pub images: BTreeMap<u16, u64>,
}

impl RunFacts {
    /// How many entries it has.
    pub fn entries(&self) -> u64 {
        self.images.values().sum()
    }
}

/// What the index consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The number of the next run: none that is lower is written again.
    pub next_run: u64,
    /// The images by their numbers.
    pub images: BTreeMap<u16, Indexed>,
    /// The runs, the largest first.
    pub runs: Vec<RunFacts>,
}

/// Why bytes are no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Another kind of file, or damage.
    #[error("it is damaged, or is no index")]
    Damaged,
    /// A format that this release does not know.
    #[error("its format is version {found}, this release reads version {MANIFEST_VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// What it says contradicts itself.
    #[error(transparent)]
    Invalid(#[from] DecodeError),
}

const FLAG_WHOLE: u8 = 1;
const FLAG_RECORD: u8 = 2;

fn put_identity(out: &mut Vec<u8>, identity: &ImageIdentity) {
    out.extend_from_slice(&identity.size.to_le_bytes());
    out.extend_from_slice(&identity.mtime_ns.to_le_bytes());
    out.extend_from_slice(&identity.inode.to_le_bytes());
}

fn identity(cursor: &mut Cursor<'_>) -> Result<ImageIdentity, DecodeError> {
    Ok(ImageIdentity {
        size: cursor.u64("file size")?,
        mtime_ns: cursor.u64("modification time")?.cast_signed(),
        inode: cursor.u64("inode")?,
    })
}

fn limited(found: u32, limit: u32, what: &'static str) -> Result<u32, DecodeError> {
    if found > limit {
        return Err(DecodeError::TooLarge { what, found: found.into(), limit: limit.into() });
    }
    Ok(found)
}

impl Manifest {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MANIFEST_MAGIC);
        out.extend_from_slice(&MANIFEST_VERSION.to_le_bytes());
        out.extend_from_slice(&(self.images.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.next_run.to_le_bytes());
        for (number, image) in &self.images {
            let path = image.path.as_os_str().as_bytes();
            let record = if image.record.is_some() { FLAG_RECORD } else { 0 };
            let whole = if image.whole { FLAG_WHOLE } else { 0 };
            out.extend_from_slice(&number.to_le_bytes());
            out.push(record | whole);
            out.extend_from_slice(&image.bytes.to_le_bytes());
            put_identity(&mut out, &image.identity);
            if let Some(record) = &image.record {
                put_identity(&mut out, record);
            }
            out.extend_from_slice(&(path.len() as u32).to_le_bytes());
            out.extend_from_slice(path);
        }
        for run in &self.runs {
            out.extend_from_slice(&run.id.to_le_bytes());
            out.extend_from_slice(&(run.images.len() as u32).to_le_bytes());
            for (image, entries) in &run.images {
                out.extend_from_slice(&image.to_le_bytes());
                out.extend_from_slice(&entries.to_le_bytes());
            }
        }
        let check = blake3::hash(&out);
        out.extend_from_slice(check.as_bytes());
        out
    }

    /// Reads it. Every number that a run names is an image's, and no two are the same.
    pub fn decode(input: &[u8]) -> Result<Self, ManifestError> {
        let body = input.len().checked_sub(MANIFEST_CHECK_BYTES).ok_or(ManifestError::Damaged)?;
        let (body, check) = input.split_at(body);
        if !body.starts_with(&MANIFEST_MAGIC) || blake3::hash(body).as_bytes() != check {
            return Err(ManifestError::Damaged);
        }
        let mut cursor = Cursor::new(&body[MANIFEST_MAGIC.len()..]);
        let version = cursor.u32("version")?;
        if version != MANIFEST_VERSION {
            return Err(ManifestError::Version { found: version });
        }
        let images = limited(cursor.u32("images")?, MAX_IMAGES as u32, "images")?;
        let runs = limited(cursor.u32("runs")?, MAX_RUNS as u32, "runs")?;
        let mut manifest = Self { next_run: cursor.u64("next run")?, ..Self::default() };
        for _ in 0..images {
            let number = cursor.u16("image")?;
            let image = Self::decode_image(&mut cursor)?;
            let above = manifest.images.last_key_value().is_none_or(|(last, _)| *last < number);
            if !above {
                return Err(DecodeError::Invalid { what: "image" }.into());
            }
            manifest.images.insert(number, image);
        }
        for _ in 0..runs {
            let run = manifest.decode_run(&mut cursor)?;
            let known = manifest.runs.iter().any(|known| known.id == run.id);
            if known || run.id >= manifest.next_run || run.entries() > MAX_RUN_ENTRIES {
                return Err(DecodeError::Invalid { what: "run" }.into());
            }
            manifest.runs.push(run);
        }
        cursor.finish()?;
        Ok(manifest)
    }

    fn decode_image(cursor: &mut Cursor<'_>) -> Result<Indexed, DecodeError> {
        let flags = cursor.u8("flags")?;
        if flags & !(FLAG_WHOLE | FLAG_RECORD) != 0 {
            return Err(DecodeError::Invalid { what: "flags" });
        }
        let bytes = cursor.u64("image size")?;
        let file = identity(cursor)?;
        let record = (flags & FLAG_RECORD != 0).then(|| identity(cursor)).transpose()?;
        let len = limited(cursor.u32("path")?, MAX_PATH_BYTES, "path")?;
        let path = cursor.take(len as usize, "path")?;
        Ok(Indexed {
            path: OsString::from_vec(path.to_vec()).into(),
            bytes,
            identity: file,
            record,
            whole: flags & FLAG_WHOLE != 0,
        })
    }

    fn decode_run(&self, cursor: &mut Cursor<'_>) -> Result<RunFacts, DecodeError> {
        let id = cursor.u64("run")?;
        let count = limited(cursor.u32("images of a run")?, MAX_IMAGES as u32, "images of a run")?;
        let mut images = BTreeMap::new();
        for _ in 0..count {
            let (image, entries) = (cursor.u16("image")?, cursor.u64("entries")?);
            let above = images.last_key_value().is_none_or(|(last, _)| *last < image);
            if !above || !self.images.contains_key(&image) || entries > MAX_RUN_ENTRIES {
                return Err(DecodeError::Invalid { what: "entries of a run" });
            }
            images.insert(image, entries);
        }
        Ok(RunFacts { id, images })
    }
}
