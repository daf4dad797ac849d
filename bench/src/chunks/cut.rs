//! Cutting an image into pieces, each with an id by its content.
//!
//! Invariant: pieces cover all of an image's data, in order, and none goes over a hole.

use std::ops::Range;

use fastcdc::v2020::FastCDC;
use longhaul_dedup::blocks;
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::pages::{PAGE_BYTES, PageHash};

use super::image::Image;

/// How an image is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outer {
    /// Every so many bytes of the disk.
    Fixed(usize),
    /// By FastCDC, with this average.
    FastCdc(u32),
    /// Behind every block whose hash says so: one of so many does. The id of a piece is the hash of
    /// its blocks' hashes, so every byte is looked at once.
    Blocks(usize),
}

/// A stretch of an image's data under one id.
pub(super) struct Piece {
    pub(super) begin: usize,
    pub(super) end: usize,
    pub(super) id: ChunkId,
}

/// An image, cut; with the hashes of its blocks if the scheme needed them for that.
pub(super) struct Scan {
    pub(super) pieces: Vec<Piece>,
    pub(super) hashes: Option<Vec<PageHash>>,
}

pub(super) fn hash_blocks(image: &Image, blocks: Range<usize>) -> Vec<PageHash> {
    blocks::hash_blocks(&image.data()[blocks.start * PAGE_BYTES..blocks.end * PAGE_BYTES])
}

/// Eight bytes of a hash, as a number to choose by.
pub(super) fn lot(hash: &PageHash) -> u64 {
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash is longer"))
}

impl Outer {
    pub(super) fn scan(self, image: &Image) -> Scan {
        match self {
            Self::Fixed(PAGE_BYTES) | Self::Blocks(1) => Self::scan_single_blocks(image),
            Self::Fixed(bytes) => {
                let pieces = image.runs().flat_map(|run| grid(image, run, bytes));
                Scan { pieces: pieces.map(|range| hashed(image, range)).collect(), hashes: None }
            }
            Self::FastCdc(avg) => {
                let avg = avg as usize;
                let mut pieces = Vec::new();
                for run in image.runs() {
                    let begin = run.start * PAGE_BYTES;
                    let data = &image.data()[begin..run.end * PAGE_BYTES];
                    for cut in FastCDC::new(data, avg / 4, avg, avg * 4) {
                        let begin = begin + cut.offset;
                        pieces.push(hashed(image, begin..begin + cut.length));
                    }
                }
                Scan { pieces, hashes: None }
            }
            Self::Blocks(avg) => Self::scan_by_blocks(image, avg),
        }
    }

    fn scan_single_blocks(image: &Image) -> Scan {
        let hashes = hash_blocks(image, 0..image.len());
        let pieces = hashes.iter().enumerate().map(|(block, hash)| Piece {
            begin: block * PAGE_BYTES,
            end: (block + 1) * PAGE_BYTES,
            id: hash.chunk_id(),
        });
        Scan { pieces: pieces.collect(), hashes: Some(hashes) }
    }

    fn scan_by_blocks(image: &Image, avg: usize) -> Scan {
        let hashes = hash_blocks(image, 0..image.len());
        let mut pieces = Vec::new();
        for run in image.runs() {
            let mut begin = run.start;
            for block in run.clone() {
                let len = block + 1 - begin;
                let chosen = len >= avg / 4 && lot(&hashes[block]).is_multiple_of(avg as u64);
                if chosen || len == avg * 4 || block + 1 == run.end {
                    pieces.push(Piece {
                        begin: begin * PAGE_BYTES,
                        end: (block + 1) * PAGE_BYTES,
                        id: blocks::id_of_blocks(&hashes[begin..=block]),
                    });
                    begin = block + 1;
                }
            }
        }
        Scan { pieces, hashes: Some(hashes) }
    }
}

fn hashed(image: &Image, range: Range<usize>) -> Piece {
    let id = ChunkId::of(&image.data()[range.clone()]);
    Piece { begin: range.start, end: range.end, id }
}

/// A run, cut where the disk's offset is a multiple of `bytes`.
fn grid(image: &Image, run: Range<usize>, bytes: usize) -> Vec<Range<usize>> {
    let step = bytes / PAGE_BYTES;
    let mut ranges = Vec::new();
    let mut begin = run.start;
    while begin < run.end {
        let to_grid = step - (image.place(begin) % step as u64) as usize;
        let end = run.end.min(begin + to_grid);
        ranges.push(begin * PAGE_BYTES..end * PAGE_BYTES);
        begin = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_and_go_over_no_hole() {
        let mut bytes = vec![0; 3000 * PAGE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes[700 * PAGE_BYTES..800 * PAGE_BYTES].fill(0);
        let image = Image::of(&bytes);
        let hole = 700 * PAGE_BYTES;
        for outer in [
            Outer::Fixed(PAGE_BYTES),
            Outer::Fixed(16 * PAGE_BYTES),
            Outer::FastCdc(64 << 10),
            Outer::Blocks(4),
            Outer::Blocks(16),
        ] {
            let mut end = 0;
            let pieces = outer.scan(&image).pieces;
            for piece in &pieces {
                assert_eq!(piece.begin, end, "{outer:?}");
                assert!(piece.end <= hole || piece.begin >= hole, "{outer:?}");
                end = piece.end;
            }
            assert_eq!(end, image.data().len(), "{outer:?}");
        }
    }
}
