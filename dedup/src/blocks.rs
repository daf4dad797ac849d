//! A disk as blocks of 4 KiB, and as pieces of whole blocks: how the engine cuts.
//!
//! File systems move things by blocks, so a block is the smallest thing that is looked for. A piece
//! is a run of blocks that ends behind one whose hash says so, and its id is the hash of its
//! blocks' hashes: every byte is hashed once, many blocks side by side ([`hash_pages`]).
//!
//! Invariant: where pieces end, and their ids, depend on nothing but the bytes of one parcel of the
//! disk and on which of them were given. No piece holds a block of zeros or goes over the end of a
//! parcel, so the same parcel of two disks can be compared by its pieces.

use std::ops::Range;

use bytes::Bytes;

use crate::{
    id::ChunkId,
    pages::{PAGE_BYTES, PageHash, hash_pages},
    recipe::{RecipeEntry, Sample},
    zeros::is_zero,
};

/// Bytes in a block; the last one of a disk may be shorter.
pub const BLOCK_BYTES: usize = PAGE_BYTES;
/// Bytes of a disk that are cut by themselves; parcels begin at multiples of it.
pub const PARCEL_BYTES: u64 = 16 << 20;
/// The longest piece, in bytes.
pub const MAX_PIECE_BYTES: u32 = (MAX_PIECE_BLOCKS * BLOCK_BYTES) as u32;
/// The longest piece, in blocks.
pub const MAX_PIECE_BLOCKS: usize = 64;
/// Blocks in a parcel, and so the most pieces in one.
pub const PARCEL_BLOCKS: usize = PARCEL_BYTES as usize / BLOCK_BYTES;

/// A chosen block ends no piece that is shorter, in blocks.
const MIN_PIECE_BLOCKS: usize = 4;
/// One of so many blocks is chosen, by its hash: it ends a piece, and is kept in the index. That
/// these are the same blocks leaves few pieces without one in the index.
const CHOSEN_OF: u64 = 16;
/// Blocks that are hashed in one go.
const HASH_BATCH: usize = 64;

/// The first 8 bytes of a block's hash: enough to look for a block, not to believe that it is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortId([u8; Self::BYTES]);

impl ShortId {
    /// Bytes in a short id.
    pub const BYTES: usize = 8;

    /// Of a block with this hash.
    pub fn of(hash: &PageHash) -> Self {
        Self(*hash.as_bytes().first_chunk().expect("a hash is longer"))
    }

    /// A short id that somebody else computed.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Whether blocks with this id are kept in the index: one of sixteen is.
    pub fn is_sampled(self) -> bool {
        u64::from_le_bytes(self.0).is_multiple_of(CHOSEN_OF)
    }
}

/// A piece of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// First byte on the disk, a multiple of [`BLOCK_BYTES`].
    pub offset: u64,
    /// Length in bytes: whole blocks, but for the last one of a disk.
    pub len: u32,
    /// [`piece_id`] of its bytes.
    pub id: ChunkId,
    /// The hashes of its blocks, in [`Scan::hashes`].
    pub hashes: Range<usize>,
}

impl Piece {
    /// As a recipe lists it.
    pub fn entry(&self) -> RecipeEntry {
        RecipeEntry { offset: self.offset, len: self.len, id: self.id }
    }

    /// Its bytes of the disk.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.len)
    }
}

/// Stretches of a disk, cut.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// The pieces, ascending, apart from each other.
    pub pieces: Vec<Piece>,
    /// The hashes of the pieces' blocks, in order.
    pub hashes: Vec<PageHash>,
    /// Runs of blocks of zeros, as bytes of the disk, ascending, apart from each other.
    pub zeros: Vec<Range<u64>>,
}

impl Scan {
    /// The blocks of all pieces that belong into the index, and where on the disk they begin.
    pub fn samples(&self) -> impl Iterator<Item = Sample> + '_ {
        self.pieces
            .iter()
            .flat_map(|piece| samples(piece.offset, &self.hashes[piece.hashes.clone()]))
    }
}

/// Cuts stretches of a disk: where each begins (a multiple of [`BLOCK_BYTES`]) and what it holds.
/// They are ascending and apart from each other, and only a disk's end is no whole block.
pub fn scan(stretches: &[(u64, Bytes)]) -> Scan {
    let mut scan = Scan::default();
    for (offset, data) in stretches {
        let mut run = 0..0;
        let mut at = 0;
        while at < data.len() {
            let block = &data[at..data.len().min(at + BLOCK_BYTES)];
            if is_zero(block) {
                scan.cut_run(*offset, &data[run.clone()], &run);
                let begin = offset + at as u64;
                let end = begin + block.len() as u64;
                match scan.zeros.last_mut() {
                    Some(last) if last.end == begin => last.end = end,
                    _ => scan.zeros.push(begin..end),
                }
                run = at + block.len()..at + block.len();
            } else {
                run.end = at + block.len();
            }
            at += block.len();
        }
        scan.cut_run(*offset, &data[run.clone()], &run);
    }
    scan
}

impl Scan {
    /// Cuts blocks that are side by side and none of them zeros: `place` of a stretch at `offset`.
    fn cut_run(&mut self, offset: u64, data: &[u8], place: &Range<usize>) {
        let first = self.hashes.len();
        self.hashes.append(&mut hash_blocks(data));
        let count = self.hashes.len() - first;
        let mut begin = 0;
        for block in 0..count {
            let len = block + 1 - begin;
            let end = (block + 1) * BLOCK_BYTES;
            let chosen =
                len >= MIN_PIECE_BLOCKS && ShortId::of(&self.hashes[first + block]).is_sampled();
            let next = offset + (place.start + end) as u64;
            let at_end = block + 1 == count || next.is_multiple_of(PARCEL_BYTES);
            if chosen || at_end || len == MAX_PIECE_BLOCKS {
                let hashes = first + begin..first + block + 1;
                let start = begin * BLOCK_BYTES;
                self.pieces.push(Piece {
                    offset: offset + (place.start + start) as u64,
                    len: (end.min(data.len()) - start) as u32,
                    id: id_of_blocks(&self.hashes[hashes.clone()]),
                    hashes,
                });
                begin = block + 1;
            }
        }
    }
}

/// Those of the blocks from `offset` on, with these hashes, that belong into the index.
pub fn samples(offset: u64, hashes: &[PageHash]) -> impl Iterator<Item = Sample> + '_ {
    let blocks = (offset..).step_by(BLOCK_BYTES).zip(hashes);
    blocks
        .map(|(offset, hash)| Sample { offset, id: ShortId::of(hash) })
        .filter(|sample| sample.id.is_sampled())
}

/// The hash of each block of `data`, in order; only the last may be shorter than a block.
pub fn hash_blocks(data: &[u8]) -> Vec<PageHash> {
    let (blocks, tail) = data.as_chunks::<BLOCK_BYTES>();
    let mut hashes = Vec::with_capacity(blocks.len() + 1);
    let mut batch = Vec::with_capacity(HASH_BATCH);
    for some in blocks.chunks(HASH_BATCH) {
        batch.extend(some.iter());
        hashes.append(&mut hash_pages(&batch));
        batch.clear();
    }
    if !tail.is_empty() {
        hashes.push(PageHash::of_short(tail));
    }
    hashes
}

/// The id of a piece whose blocks have these hashes.
pub fn id_of_blocks(hashes: &[PageHash]) -> ChunkId {
    let mut hasher = blake3::Hasher::new();
    for hash in hashes {
        hasher.update(hash.as_bytes());
    }
    ChunkId::from_bytes(*hasher.finalize().as_bytes())
}

/// The id of a piece with this content.
pub fn piece_id(data: &[u8]) -> ChunkId {
    id_of_blocks(&hash_blocks(data))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One letter for each block: of zeros, or of noise that the letter stands for.
    fn disk(letters: &[u8], tail: usize) -> Bytes {
        let mut bytes = vec![0; letters.len() * BLOCK_BYTES + tail];
        for (block, letter) in bytes.chunks_mut(BLOCK_BYTES).zip(letters) {
            if *letter > 0 {
                blake3::Hasher::new().update(&[*letter]).finalize_xof().fill(block);
            }
        }
        let at = letters.len() * BLOCK_BYTES;
        bytes[at..].fill(7);
        bytes.into()
    }

    /// What every scan must be, whatever was scanned.
    fn check(scan: &Scan, stretches: &[(u64, Bytes)]) {
        let mut covered: Vec<Range<u64>> = scan.zeros.clone();
        for piece in &scan.pieces {
            let range = piece.offset..piece.offset + u64::from(piece.len);
            assert_eq!(range.start / PARCEL_BYTES, (range.end - 1) / PARCEL_BYTES);
            assert!(piece.len <= MAX_PIECE_BYTES);
            let (offset, data) = stretches
                .iter()
                .find(|(offset, data)| {
                    (*offset..offset + data.len() as u64).contains(&piece.offset)
                })
                .expect("a piece is of a stretch");
            let start = (range.start - offset) as usize;
            let data = &data[start..start + piece.len as usize];
            assert_eq!(piece.id, piece_id(data));
            assert_eq!(scan.hashes[piece.hashes.clone()], hash_blocks(data));
            assert!(data.chunks(BLOCK_BYTES).all(|block| !is_zero(block)));
            covered.push(range);
        }
        covered.sort_by_key(|range| range.start);
        let bytes: u64 = covered.iter().map(|range| range.end - range.start).sum();
        assert!(covered.windows(2).all(|two| two[0].end <= two[1].start));
        assert_eq!(bytes, stretches.iter().map(|(_, data)| data.len() as u64).sum::<u64>());
    }

    #[test]
    fn a_short_tail_is_a_block_of_its_own() {
        let data = disk(&[1, 2], 100);
        let stretches = [(8192, data.clone())];
        let scan = scan(&stretches);
        check(&scan, &stretches);
        assert_eq!(scan.hashes.len(), 3);
        assert_eq!(scan.hashes[2].chunk_id(), ChunkId::of(&data[8192..]));
        let zeros = super::scan(&[(0, Bytes::from(vec![0; 4100]))]);
        assert_eq!(zeros, Scan { zeros: Vec::from_iter(Some(0..4100)), ..Scan::default() });
    }

    #[test]
    fn a_parcel_is_cut_alike_whatever_lies_around_it() {
        let letters: Vec<u8> = (0..6000_u32).map(|block| (block * 37 % 251 + 1) as u8).collect();
        let all = disk(&letters, 0);
        let parcel = PARCEL_BYTES as usize;
        let whole = scan(&[(0, all.clone())]);
        let second = scan(&[(PARCEL_BYTES, all.slice(parcel..))]);
        let of_second: Vec<(u64, ChunkId)> = whole
            .pieces
            .iter()
            .filter(|piece| piece.offset >= PARCEL_BYTES)
            .map(|piece| (piece.offset, piece.id))
            .collect();
        let alone: Vec<(u64, ChunkId)> =
            second.pieces.iter().map(|piece| (piece.offset, piece.id)).collect();
        assert_eq!(of_second, alone);
        check(&whole, &[(0, all)]);
    }

    #[test]
    fn pieces_are_of_64_kib_and_a_sixteenth_is_sampled() {
        let mut bytes = vec![0; 64 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        let scan = scan(&[(0, bytes.into())]);
        let mean = (64 << 20) / scan.pieces.len();
        assert!((56 << 10..84 << 10).contains(&mean), "{mean}");
        let samples = scan.samples().count();
        assert!((900..1150).contains(&samples), "{samples} of 16384");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_and_zeros_cover_everything_once(
            letters in prop::collection::vec(prop_oneof![3 => 1_u8..=255, 1 => Just(0)], 1..300),
            first in 0_u64..20_000,
            hole in 1_u64..100,
            split in any::<prop::sample::Index>(),
            tail in 0_usize..BLOCK_BYTES,
        ) {
            let data = disk(&letters, tail);
            let at = split.index(letters.len()) * BLOCK_BYTES;
            let first = first * BLOCK_BYTES as u64;
            let rest = first + at as u64 + hole * BLOCK_BYTES as u64;
            let stretches = [(first, data.slice(..at)), (rest, data.slice(at..))];
            check(&scan(&stretches), &stretches);
        }

        #[test]
        fn one_changed_block_changes_few_pieces(
            letters in prop::collection::vec(1_u8..=255, 300..400),
            at in any::<prop::sample::Index>(),
        ) {
            let old = scan(&[(0, disk(&letters, 0))]);
            let mut letters = letters;
            let at = at.index(letters.len());
            letters[at] ^= 0x80 | u8::from(letters[at] == 0x80);
            let new = scan(&[(0, disk(&letters, 0))]);
            let known = |piece: &&Piece| !old.pieces.iter().any(|old| old.id == piece.id);
            let bytes: u64 = new.pieces.iter().filter(known).map(|piece| u64::from(piece.len)).sum();
            // The piece with the block, and those up to where both are cut alike again.
            prop_assert!(bytes <= 6 * u64::from(MAX_PIECE_BYTES), "{bytes}");
        }
    }
}
