//! Pages of guest memory as they cross the WAN, many at a time.
//!
//! Invariant: a batch says for each of its records exactly what the page is to become, and its
//! [`ContentHash`] proves it: over the place and the BLAKE3 hash of every page, in record order, as
//! the source has them. [`PageBatch::rebuild`] gives pages only after it matched, so a reference or
//! a difference that went astray is found before a byte reaches the guest.
//!
//! Equal fields stand together, because that is how they compress:
//!
//! ```text
//! version u8 | content hash (32 bytes) | Packed:
//!   count varint
//!   | count kinds (u8: 0 zero run, 1 full, 2 same, 3 delta, 4 block)
//!   | count regions (varint, zigzag difference to the record before)
//!   | count pages (varint, zigzag difference to the page behind the record before)
//!   | for each zero run: pages in it (varint)
//!   | for each same: region, page (varints, zigzag difference to the record's own)
//!   | for each block: disk, block (varints, zigzag difference to the block behind the last one's)
//!   | for each delta: bitmap (u16)
//!   | for each full: 4096 bytes
//!   | for each delta: its changed sub-blocks
//! ```
//! Everything goes in record order, and the differences of regions and pages begin from 0.

mod rebuild;

use bytes::Bytes;

pub use rebuild::{Placed, RebuildError};

use crate::{
    compress::{Compressor, Level, MAX_UNPACKED_BYTES, Packed, UnpackError, decompress},
    cursor::{Cursor, DecodeError, put_difference, put_varint},
    delta::Delta,
    pages::{PAGE_BYTES, Page, PageHash},
};

/// Records in one batch: 16 MiB of pages.
pub const MAX_PAGES_PER_BATCH: usize = 4096;

/// A batch's unpacked length, with the widest headers: a kind, six varints, a bitmap.
const MAX_UNPACKED_BATCH: usize = MAX_PAGES_PER_BATCH * (PAGE_BYTES + 72);
const _: () = assert!(MAX_UNPACKED_BATCH <= MAX_UNPACKED_BYTES);

const VERSION: u8 = 2;
const KIND_ZERO: u8 = 0;
const KIND_FULL: u8 = 1;
const KIND_SAME: u8 = 2;
const KIND_DELTA: u8 = 3;
const KIND_BLOCK: u8 = 4;

/// A page's place in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageAt {
    /// Index of the region in the memory layout.
    pub region: u16,
    /// Page number within the region.
    pub page: u64,
}

/// A block's place on a disk that the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockAt {
    /// The disk, by its place in the VM's description.
    pub disk: u16,
    /// Its number there, in blocks of a page's size.
    pub block: u64,
}

/// What one page, or a run of them, is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageRecord {
    /// Zeros.
    Zero {
        /// The first page.
        at: PageAt,
        /// Pages in a row, never 0.
        count: u32,
    },
    /// The content that comes with it.
    Full {
        /// The page.
        at: PageAt,
        /// Its content.
        content: Page,
    },
    /// The content that another page has at the target: by the last earlier record of this batch
    /// that is about it, else as the target last got it in an earlier batch.
    Same {
        /// The page.
        at: PageAt,
        /// The page whose content it gets.
        like: PageAt,
    },
    /// Its own content at the target (as in `Same`), changed.
    Delta {
        /// The page.
        at: PageAt,
        /// What changes.
        delta: Delta,
    },
    /// What a block of a disk holds at the target.
    Block {
        /// The page.
        at: PageAt,
        /// The block whose content it gets.
        block: BlockAt,
    },
}

impl PageRecord {
    /// The page, or the first one.
    pub fn at(&self) -> PageAt {
        match self {
            Self::Zero { at, .. }
            | Self::Full { at, .. }
            | Self::Same { at, .. }
            | Self::Delta { at, .. }
            | Self::Block { at, .. } => *at,
        }
    }

    /// How many pages it is about.
    pub fn pages(&self) -> u64 {
        match self {
            Self::Zero { count, .. } => u64::from(*count),
            _ => 1,
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Zero { .. } => KIND_ZERO,
            Self::Full { .. } => KIND_FULL,
            Self::Same { .. } => KIND_SAME,
            Self::Delta { .. } => KIND_DELTA,
            Self::Block { .. } => KIND_BLOCK,
        }
    }

    fn behind(&self) -> u64 {
        self.at().page.wrapping_add(self.pages())
    }
}

/// What every page of a batch is to become, as one hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentHash([u8; blake3::OUT_LEN]);

impl ContentHash {
    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; blake3::OUT_LEN] {
        &self.0
    }
}

/// Makes the [`ContentHash`] of a batch, from the contents that the source has, record by record.
///
/// The hash is BLAKE3 over, for each record: `u8` 0, region (`u16`), page (`u64`), count (`u32`)
/// for a zero run; `u8` 1, region, page and the page's BLAKE3 hash for any other.
#[derive(Debug, Clone)]
pub struct ContentHasher {
    hasher: blake3::Hasher,
    /// Records go to the hasher many at a time: it is slow on few bytes.
    pending: Vec<u8>,
}

const HASH_AT_ONCE: usize = 16 << 10;

impl ContentHasher {
    /// A hasher at the beginning of a batch.
    pub fn new() -> Self {
        Self { hasher: blake3::Hasher::new(), pending: Vec::with_capacity(HASH_AT_ONCE + 64) }
    }

    /// The next record is a run of zeros.
    pub fn zero(&mut self, at: PageAt, count: u32) {
        self.place(0, at);
        self.pending.extend_from_slice(&count.to_le_bytes());
        self.flush_if_large();
    }

    /// The next record is a page, which is to have the content with this hash in the end.
    pub fn page(&mut self, at: PageAt, content: &PageHash) {
        self.place(1, at);
        self.pending.extend_from_slice(content.as_bytes());
        self.flush_if_large();
    }

    /// The hash of all records.
    pub fn finish(mut self) -> ContentHash {
        self.hasher.update(&self.pending);
        ContentHash(*self.hasher.finalize().as_bytes())
    }

    fn place(&mut self, kind: u8, at: PageAt) {
        self.pending.push(kind);
        self.pending.extend_from_slice(&at.region.to_le_bytes());
        self.pending.extend_from_slice(&at.page.to_le_bytes());
    }

    fn flush_if_large(&mut self) {
        if self.pending.len() >= HASH_AT_ONCE {
            self.hasher.update(&self.pending);
            self.pending.clear();
        }
    }
}

impl Default for ContentHasher {
    fn default() -> Self {
        Self::new()
    }
}

/// What a decoder accepts beyond the format itself.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Records in a batch; [`MAX_PAGES_PER_BATCH`] holds as well.
    pub records: usize,
    /// Pages in each region of the guest's memory: no record goes beyond.
    pub region_pages: &'a [u64],
}

/// A batch that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageBatchError {
    /// It is not what [`encode`] writes.
    #[error("page batch: {0}")]
    Malformed(#[from] DecodeError),
    /// It cannot be unpacked.
    #[error("page batch: {0}")]
    Unpack(#[from] UnpackError),
    /// A record names pages that the guest does not have.
    #[error("page batch: region {region} has no {count} pages from page {page}")]
    OutsideMemory {
        /// The region.
        region: u64,
        /// The first page.
        page: u64,
        /// How many pages.
        count: u32,
    },
}

/// A decoded batch: well-formed and within the guest's memory, but not yet proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBatch {
    records: Vec<PageRecord>,
    content_hash: ContentHash,
}

impl PageBatch {
    /// The records, in the order in which they are to be applied.
    pub fn records(&self) -> &[PageRecord] {
        &self.records
    }

    /// What the source says that the pages hash to.
    pub fn content_hash(&self) -> ContentHash {
        self.content_hash
    }
}

/// The serialized form of a batch. `content_hash` covers what the records' pages are to become.
///
/// # Panics
/// If there are more than [`MAX_PAGES_PER_BATCH`] records, or an empty run of zeros.
pub fn encode(
    records: &[PageRecord],
    content_hash: ContentHash,
    compressor: &mut Compressor,
    level: Level,
) -> Bytes {
    assert!(records.len() <= MAX_PAGES_PER_BATCH, "batches are made of so many records");
    let content = |record: &PageRecord| match record {
        PageRecord::Full { .. } => PAGE_BYTES,
        PageRecord::Delta { delta, .. } => delta.data().len(),
        _ => 0,
    };
    let content_bytes: usize = records.iter().map(content).sum();
    let mut plain = Vec::with_capacity(content_bytes + 8 * records.len() + 8);
    put_varint(&mut plain, records.len() as u64);
    plain.extend(records.iter().map(PageRecord::kind));
    let mut region = 0;
    for record in records {
        put_difference(&mut plain, u64::from(record.at().region), region);
        region = u64::from(record.at().region);
    }
    let mut behind = 0;
    for record in records {
        put_difference(&mut plain, record.at().page, behind);
        behind = record.behind();
    }
    for record in records {
        if let PageRecord::Zero { count, .. } = record {
            assert!(*count > 0, "a run has pages");
            put_varint(&mut plain, u64::from(*count));
        }
    }
    for record in records {
        if let PageRecord::Same { at, like } = record {
            put_difference(&mut plain, u64::from(like.region), u64::from(at.region));
            put_difference(&mut plain, like.page, at.page);
        }
    }
    let mut next = BlockAt { disk: 0, block: 0 };
    for record in records {
        if let PageRecord::Block { block, .. } = record {
            put_difference(&mut plain, u64::from(block.disk), u64::from(next.disk));
            put_difference(&mut plain, block.block, next.block);
            next = BlockAt { block: block.block.wrapping_add(1), ..*block };
        }
    }
    for record in records {
        if let PageRecord::Delta { delta, .. } = record {
            plain.extend_from_slice(&delta.changed().to_le_bytes());
        }
    }
    for record in records {
        if let PageRecord::Full { content, .. } = record {
            plain.extend_from_slice(content.as_array());
        }
    }
    for record in records {
        if let PageRecord::Delta { delta, .. } = record {
            plain.extend_from_slice(delta.data());
        }
    }
    let packed = compressor.compress(level, plain.into());
    let mut out = Vec::with_capacity(packed.packed_len() + 48);
    out.push(VERSION);
    out.extend_from_slice(content_hash.as_bytes());
    packed.encode_into(&mut out);
    out.into()
}

/// Reads what [`encode`] wrote. Contents are parts of one allocation, not copies.
pub fn decode(bytes: &Bytes, limits: &Limits<'_>) -> Result<PageBatch, PageBatchError> {
    let mut cursor = Cursor::of_version(bytes, VERSION)?;
    let content_hash = ContentHash(cursor.array("content hash")?);
    let packed = Packed::decode(&bytes.slice_ref(cursor.rest()))?;
    let max_records = limits.records.min(MAX_PAGES_PER_BATCH);
    let plain = decompress(&packed, max_records * (PAGE_BYTES + 72))?;
    let records = decode_records(&plain, max_records, limits)?;
    Ok(PageBatch { records, content_hash })
}

fn decode_records(
    plain: &Bytes,
    max_records: usize,
    limits: &Limits<'_>,
) -> Result<Vec<PageRecord>, PageBatchError> {
    let mut cursor = Cursor::new(plain);
    let count = cursor.count(max_records, "records")?;
    let kinds = cursor.take(count, "kinds")?;
    if kinds.iter().any(|kind| *kind > KIND_BLOCK) {
        return Err(DecodeError::Invalid { what: "kind" }.into());
    }
    let of_kind = |kind: u8| kinds.iter().filter(move |found| **found == kind).count();
    let mut regions = Vec::with_capacity(count);
    let mut region = 0;
    for _ in 0..count {
        region = cursor.difference(region, "region")?;
        regions.push(region);
    }
    // The page column can be followed only with the counts of zero runs, which come behind it.
    let mut pages = cursor;
    for _ in 0..count {
        cursor.varint("page")?;
    }
    let mut runs = cursor;
    for _ in 0..of_kind(KIND_ZERO) {
        cursor.varint("pages in a row")?;
    }
    let mut likes = cursor;
    for _ in 0..2 * of_kind(KIND_SAME) {
        cursor.varint("page of the same content")?;
    }
    let mut blocks = cursor;
    for _ in 0..2 * of_kind(KIND_BLOCK) {
        cursor.varint("block of a disk")?;
    }
    let deltas = of_kind(KIND_DELTA);
    let mut bitmaps = Cursor::new(cursor.take(2 * deltas, "bitmaps")?);
    let mut fulls = Cursor::new(cursor.take(of_kind(KIND_FULL) * PAGE_BYTES, "contents")?);
    let mut sub_blocks = cursor;

    let mut records = Vec::with_capacity(count);
    let mut behind = 0;
    let mut next = BlockAt { disk: 0, block: 0 };
    for (kind, region) in kinds.iter().zip(regions) {
        let page = pages.difference(behind, "page")?;
        let run = if *kind == KIND_ZERO { take_run(&mut runs)? } else { 1 };
        let at = limits.place(region, page, run)?;
        let record = match *kind {
            KIND_ZERO => PageRecord::Zero { at, count: run },
            KIND_FULL => {
                let content = plain.slice_ref(fulls.take(PAGE_BYTES, "contents")?);
                let content = Page::try_from(content)
                    .map_err(|_| DecodeError::Truncated { what: "contents" })?;
                PageRecord::Full { at, content }
            }
            KIND_SAME => {
                let region = likes.difference(region, "region of the same content")?;
                let page = likes.difference(page, "page of the same content")?;
                PageRecord::Same { at, like: limits.place(region, page, 1)? }
            }
            KIND_BLOCK => {
                let disk = blocks.difference(u64::from(next.disk), "disk")?;
                let disk =
                    u16::try_from(disk).map_err(|_| DecodeError::Invalid { what: "disk" })?;
                let block = blocks.difference(next.block, "block of a disk")?;
                next = BlockAt { disk, block: block.wrapping_add(1) };
                PageRecord::Block { at, block: BlockAt { disk, block } }
            }
            _ => {
                let changed = bitmaps.u16("bitmaps")?;
                let data = sub_blocks.take(Delta::data_bytes(changed), "changed sub-blocks")?;
                PageRecord::Delta { at, delta: Delta::new(changed, plain.slice_ref(data))? }
            }
        };
        behind = record.behind();
        records.push(record);
    }
    sub_blocks.finish()?;
    Ok(records)
}

fn take_run(runs: &mut Cursor<'_>) -> Result<u32, DecodeError> {
    match runs.bounded(u64::from(u32::MAX), "pages in a row")? {
        0 => Err(DecodeError::Invalid { what: "pages in a row" }),
        count => Ok(count as u32),
    }
}

impl Limits<'_> {
    /// A place that the guest has, with `count` pages from there on.
    fn place(&self, region: u64, page: u64, count: u32) -> Result<PageAt, PageBatchError> {
        let outside = PageBatchError::OutsideMemory { region, page, count };
        let number = u16::try_from(region).map_err(|_| outside.clone())?;
        let pages = self.region_pages.get(usize::from(number)).copied().unwrap_or(0);
        let fits = page.checked_add(u64::from(count)).is_some_and(|end| end <= pages);
        if fits { Ok(PageAt { region: number, page }) } else { Err(outside) }
    }
}
