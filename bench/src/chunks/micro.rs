//! What could still be found inside missing blocks: pieces of some hundred bytes.
//!
//! A source does not have the target's old image, so it cannot make a patch. But where the target has
//! something similar, the source can send short hashes of small pieces, be told which of them are
//! there, and send the rest: what rsync does, in the few places where it pays.
//!
//! Invariant: only the bytes are counted that are in no piece found; hashes are counted beside.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::Range;

use longhaul_dedup::pages::PAGE_BYTES;

use super::image::Image;

/// A cut falls behind one in so many positions.
const AVERAGE_BYTES: u64 = 256;
/// The shortest piece.
const MIN_BYTES: usize = 64;
/// The longest piece.
const MAX_BYTES: usize = 1024;
/// Bytes of one hash on the wire: enough among the pieces of one neighbourhood, as the whole is
/// verified afterwards.
const HASH_BYTES: u64 = 5;
/// Blocks around a place that belong to its neighbourhood.
const NEAR_BLOCKS: usize = 16;

/// What is left, and what it cost on the wire to know.
#[derive(Debug, Default)]
pub struct Rest {
    /// Bytes of the new image's data that must be sent.
    pub ranges: Vec<Range<usize>>,
    /// Bytes of hashes of small pieces.
    pub hash_bytes: u64,
}

/// Where the old image may have something similar: a stretch of the new one, and the shifts at which
/// what lies around it was found.
#[derive(Debug, Clone)]
pub struct Hint {
    /// The stretch of the new image.
    pub range: Range<usize>,
    /// From its bytes to those of the old image.
    pub shifts: Vec<i64>,
}

/// Ends of small pieces, cut by content: the 2^64-modular rolling hash known as gear.
fn cuts(data: &[u8], gear: &[u64; 256]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut begin, mut hash) = (0, 0_u64);
    for (at, byte) in data.iter().enumerate() {
        hash = (hash << 1).wrapping_add(gear[usize::from(*byte)]);
        let len = at + 1 - begin;
        let is_chosen = len >= MIN_BYTES && hash >> 32 < (1 << 32) / AVERAGE_BYTES;
        if is_chosen || len == MAX_BYTES || at + 1 == data.len() {
            ranges.push(begin..at + 1);
            begin = at + 1;
        }
    }
    ranges
}

fn gear() -> [u64; 256] {
    let mut bytes = [0; 2048];
    blake3::Hasher::new().update(b"gear").finalize_xof().fill(&mut bytes);
    let mut table = [0; 256];
    for (value, bytes) in table.iter_mut().zip(bytes.as_chunks().0) {
        *value = u64::from_le_bytes(*bytes);
    }
    table
}

/// Small pieces, by 64 bits of a hash.
struct Pieces {
    gear: [u64; 256],
    known: HashSet<u64>,
}

impl Pieces {
    fn new() -> Self {
        Self { gear: gear(), known: HashSet::new() }
    }

    fn hash(piece: &[u8]) -> u64 {
        BuildHasherDefault::<DefaultHasher>::default().hash_one(piece)
    }

    fn learn(&mut self, data: &[u8]) {
        for cut in cuts(data, &self.gear) {
            self.known.insert(Self::hash(&data[cut]));
        }
    }

    fn subtract(&self, new: &Image, range: &Range<usize>, rest: &mut Rest) {
        let data = &new.data()[range.clone()];
        for cut in cuts(data, &self.gear) {
            rest.hash_bytes += HASH_BYTES;
            if !self.known.contains(&Self::hash(&data[cut.clone()])) {
                let cut = range.start + cut.start..range.start + cut.end;
                match rest.ranges.last_mut() {
                    Some(last) if last.end == cut.start => last.end = cut.end,
                    _ => rest.ranges.push(cut),
                }
            }
        }
    }
}

/// What is in no small piece of the whole old image: the bound of what such pieces can give.
pub fn beyond_all(old: &Image, new: &Image, missing: &[Range<usize>]) -> Rest {
    let mut pieces = Pieces::new();
    pieces.learn(old.data());
    let mut rest = Rest::default();
    for range in missing {
        pieces.subtract(new, range, &mut rest);
    }
    rest
}

/// What is in no small piece of the neighbourhood: the same place of the old image, and what lies there
/// beside what was found around the stretch.
pub fn beyond_near(old: &Image, new: &Image, missing: &[Range<usize>], hints: &[Hint]) -> Rest {
    let mut rest = Rest::default();
    let mut missing = missing.iter().peekable();
    for hint in hints {
        let mut pieces = Pieces::new();
        for blocks in neighbourhood(old, new, hint) {
            pieces.learn(&old.data()[blocks.start * PAGE_BYTES..blocks.end * PAGE_BYTES]);
        }
        while let Some(range) = missing.next_if(|range| range.end <= hint.range.end) {
            pieces.subtract(new, range, &mut rest);
        }
    }
    rest
}

fn neighbourhood(old: &Image, new: &Image, hint: &Hint) -> Vec<Range<usize>> {
    let (first, last) = (hint.range.start / PAGE_BYTES, (hint.range.end - 1) / PAGE_BYTES);
    let here = old.places_before(new.place(first))..old.places_before(new.place(last) + 1);
    let mut near = vec![here];
    for shift in &hint.shifts {
        let shift = shift.div_euclid(PAGE_BYTES as i64);
        let moved = |block: usize| usize::try_from(block as i64 + shift).unwrap_or(0);
        near.push(moved(first)..moved(last + 1));
    }
    let clip = |range: Range<usize>| {
        let end = (range.end + NEAR_BLOCKS).min(old.len());
        range.start.saturating_sub(NEAR_BLOCKS).min(end)..end
    };
    near.into_iter().map(clip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(blocks: usize) -> Vec<u8> {
        let mut bytes = vec![0; blocks * PAGE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn a_changed_byte_costs_a_small_piece_or_two() {
        let bytes = noise(8);
        let mut changed = bytes.clone();
        changed[10_000] ^= 1;
        let (old, new) = (Image::of(&bytes), Image::of(&changed));
        let all = 0..new.data().len();
        let hint = Hint { range: all.clone(), shifts: vec![] };
        for rest in [
            beyond_all(&old, &new, std::slice::from_ref(&all)),
            beyond_near(&old, &new, std::slice::from_ref(&all), &[hint]),
        ] {
            let bytes: usize = rest.ranges.iter().map(Range::len).sum();
            assert!((MIN_BYTES..=2 * MAX_BYTES).contains(&bytes), "{bytes}");
            assert!(rest.ranges.iter().any(|range| range.contains(&10_000)));
        }
    }
}
