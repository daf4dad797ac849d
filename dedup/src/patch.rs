//! A piece as a difference to a similar stretch of which only the target has the bytes and the
//! source knows the [names](crate::grains) of its grains.
//!
//! Names are short, so a grain alone is no match: two in a row are. Some matches will be mistaken all
//! the same, by chance or because a guest wants it; what the target makes of the patch is then not
//! the piece, which its id says, and the piece is sent whole.
//!
//! Invariant: a patch holds every byte of the wanted blocks that it does not copy, and no others, so a
//! [`Patch`] that [`apply`](Patch::apply) accepts fills exactly those blocks.
//!
//! ```text
//! count of copies varint
//! | for each: bytes since the last one varint, first grain varint (zigzag difference to the one behind
//! |   the last copy), grains varint
//! | the bytes of wanted blocks that are in no copy
//! ```

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;

use crate::{
    blocks::{BLOCK_BYTES, MAX_PIECE_BYTES},
    cursor::{Cursor, DecodeError, put_difference, put_varint},
    grains::{self, GrainName, MIN_GRAIN_BYTES},
};

/// Grains of one base that are named: of a piece's length and a quarter more, twice.
pub const MAX_BASE_GRAINS: usize = 4096;
/// Copies in one patch.
const MAX_COPIES: usize = MAX_PIECE_BYTES as usize / (2 * MIN_GRAIN_BYTES);
/// Grains in a row that are a match.
const MIN_MATCH: usize = 2;
/// Places of one name that are looked at.
const MAX_PLACES: usize = 8;

/// Stretches that seem to be similar to a piece.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Base {
    grains: Vec<Bytes>,
    bytes: u64,
}

impl Base {
    /// Of stretches, one behind the other, as far as [`MAX_BASE_GRAINS`] go.
    pub fn of(stretches: &[Bytes]) -> Self {
        let all = stretches.iter().flat_map(|data| grains::cut(data).map(|g| data.slice(g.range)));
        let grains: Vec<Bytes> = all.take(MAX_BASE_GRAINS).collect();
        let bytes = grains.iter().map(|grain| grain.len() as u64).sum();
        Self { grains, bytes }
    }

    /// How many grains it has.
    pub fn len(&self) -> usize {
        self.grains.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.grains.is_empty()
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The names of its grains.
    pub fn names(&self) -> Vec<GrainName> {
        self.grains.iter().map(|grain| grains::name(grain)).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Copied {
    /// Bytes of the piece between the last copy and this one.
    gap: usize,
    first: usize,
    grains: usize,
}

/// What makes the wanted blocks of a piece from a [`Base`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    copies: Vec<Copied>,
    rest: Bytes,
}

/// A patch that does not fit the piece or the base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a patch that does not fit what it is for")]
pub struct Misfit;

/// The bytes of wanted blocks in a range of a piece.
fn wanted_in<'a>(
    range: &Range<usize>,
    wanted: &'a [bool],
) -> impl Iterator<Item = Range<usize>> + use<'a> {
    let range = range.clone();
    let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
    blocks.filter(|block| wanted.get(*block).is_some_and(|wanted| *wanted)).map(move |block| {
        let start = block * BLOCK_BYTES;
        range.start.max(start)..range.end.min(start + BLOCK_BYTES)
    })
}

impl Patch {
    /// What makes the wanted blocks of `piece` from a base of these grains. `None` if there is no
    /// match.
    pub fn make(piece: &[u8], wanted: &[bool], base: &[GrainName]) -> Option<Self> {
        let mut places: HashMap<GrainName, Vec<usize>> = HashMap::with_capacity(base.len());
        for (place, name) in base.iter().enumerate() {
            let places = places.entry(*name).or_default();
            if places.len() < MAX_PLACES {
                places.push(place);
            }
        }
        let ranges: Vec<Range<usize>> = grains::cut(piece).map(|grain| grain.range).collect();
        let names: Vec<GrainName> =
            ranges.iter().map(|range| grains::name(&piece[range.clone()])).collect();
        let same = |at: usize, place: usize| {
            names[at..]
                .iter()
                .zip(&base[place..])
                .take_while(|(ours, theirs)| ours == theirs)
                .count()
        };
        let mut copies = Vec::new();
        let mut rest = Vec::new();
        let (mut at, mut end) = (0, 0);
        while at < names.len() {
            let candidates = places.get(&names[at]).map_or(&[][..], Vec::as_slice);
            let longest = candidates.iter().map(|place| (same(at, *place), *place)).max();
            let Some((grains, first)) = longest.filter(|(grains, _)| *grains >= MIN_MATCH) else {
                at += 1;
                continue;
            };
            let range = ranges[at].start..ranges[at + grains - 1].end;
            at += grains;
            if wanted_in(&range, wanted).next().is_none() || copies.len() == MAX_COPIES {
                continue;
            }
            wanted_in(&(end..range.start), wanted)
                .for_each(|gap| rest.extend_from_slice(&piece[gap]));
            copies.push(Copied { gap: range.start - end, first, grains });
            end = range.end;
        }
        if copies.is_empty() {
            return None;
        }
        wanted_in(&(end..piece.len()), wanted).for_each(|gap| rest.extend_from_slice(&piece[gap]));
        Some(Self { copies, rest: rest.into() })
    }

    /// The serialized form.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(2 + 6 * self.copies.len() + self.rest.len());
        put_varint(&mut out, self.copies.len() as u64);
        let mut next = 0;
        for copied in &self.copies {
            put_varint(&mut out, copied.gap as u64);
            put_difference(&mut out, copied.first as u64, next);
            put_varint(&mut out, copied.grains as u64);
            next = (copied.first + copied.grains) as u64;
        }
        out.extend_from_slice(&self.rest);
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let count = cursor.count(MAX_COPIES, "copies")?;
        let mut copies = Vec::with_capacity(count.min(bytes.len()));
        let mut next = 0;
        for _ in 0..count {
            let gap = cursor.bounded(u64::from(MAX_PIECE_BYTES), "gap")? as usize;
            let first = cursor.difference(next, "first grain")?;
            let grains = cursor.bounded(MAX_BASE_GRAINS as u64, "grains")?;
            if first > MAX_BASE_GRAINS as u64 || grains == 0 {
                return Err(DecodeError::Invalid { what: "copy" });
            }
            next = first + grains;
            copies.push(Copied { gap, first: first as usize, grains: grains as usize });
        }
        Ok(Self { copies, rest: bytes.slice_ref(cursor.rest()) })
    }

    /// The wanted blocks of a piece of `len` bytes, in order.
    pub fn apply(&self, base: &Base, len: usize, wanted: &[bool]) -> Result<Vec<Bytes>, Misfit> {
        let mut piece = vec![0; len];
        let mut rest = &self.rest[..];
        let mut at = 0;
        let mut fill = |piece: &mut [u8], range: Range<usize>| {
            for gap in wanted_in(&range, wanted) {
                let (head, tail) = rest.split_at_checked(gap.len()).ok_or(Misfit)?;
                piece[gap].copy_from_slice(head);
                rest = tail;
            }
            Ok(())
        };
        for copied in &self.copies {
            let begin = at + copied.gap;
            if begin > len {
                return Err(Misfit);
            }
            fill(&mut piece, at..begin)?;
            at = begin;
            let grains = base.grains.get(copied.first..copied.first + copied.grains);
            for grain in grains.ok_or(Misfit)? {
                let place = piece.get_mut(at..at + grain.len()).ok_or(Misfit)?;
                place.copy_from_slice(grain);
                at += grain.len();
            }
        }
        fill(&mut piece, at..len)?;
        if !rest.is_empty() {
            return Err(Misfit);
        }
        let piece = Bytes::from(piece);
        Ok((0..len.div_ceil(BLOCK_BYTES))
            .filter(|block| wanted.get(*block).is_some_and(|wanted| *wanted))
            .map(|block| piece.slice(block * BLOCK_BYTES..len.min((block + 1) * BLOCK_BYTES)))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn base(stretches: &[&[u8]]) -> Base {
        let stretches: Vec<Bytes> = stretches.iter().copied().map(Bytes::copy_from_slice).collect();
        Base::of(&stretches)
    }

    fn blocks(piece: &[u8], wanted: &[bool]) -> Vec<Bytes> {
        let blocks = piece.chunks(BLOCK_BYTES).zip(wanted).filter(|(_, wanted)| **wanted);
        blocks.map(|(block, _)| Bytes::copy_from_slice(block)).collect()
    }

    #[test]
    fn a_changed_byte_costs_a_grain_or_two() {
        let old = noise(1, 65_536);
        // Moved by some bytes, and one of them is another.
        let mut piece = [&noise(2, 100)[..], &old[..65_436]].concat();
        piece[30_000] ^= 1;
        let base = base(&[&old]);
        let wanted = vec![true; 16];
        let patch = Patch::make(&piece, &wanted, &base.names()).unwrap();
        assert!(patch.encode().len() < 2500, "{}", patch.encode().len());
        let patch = Patch::decode(&patch.encode()).unwrap();
        assert_eq!(patch.apply(&base, piece.len(), &wanted), Ok(blocks(&piece, &wanted)));
        // Only what is wanted is sent.
        let wanted: Vec<bool> = (0..16).map(|block| block == 7).collect();
        let patch = Patch::make(&piece, &wanted, &base.names()).unwrap();
        assert!(patch.encode().len() < 1500, "{}", patch.encode().len());
        assert_eq!(patch.apply(&base, piece.len(), &wanted), Ok(blocks(&piece, &wanted)));
        assert_eq!(Patch::make(&noise(3, 65_536), &wanted, &base.names()), None);
    }

    #[test]
    fn what_does_not_fit_is_found_out() {
        let old = noise(1, 8192);
        let base = base(&[&old]);
        let wanted = [true, true];
        let patch = Patch::make(&old, &wanted, &base.names()).unwrap();
        assert!(patch.rest.is_empty());
        assert!(patch.apply(&base, 8192, &wanted).is_ok());
        assert_eq!(patch.apply(&base, 4096, &wanted), Err(Misfit));
        assert_eq!(patch.apply(&Base::default(), 8192, &wanted), Err(Misfit));
        let longer = Patch { rest: Bytes::from_static(b"x"), ..patch };
        assert_eq!(longer.apply(&base, 8192, &wanted), Err(Misfit));
        let empty = Patch { copies: Vec::new(), rest: Bytes::new() };
        assert_eq!(empty.apply(&base, 8192, &wanted), Err(Misfit));
        assert_eq!(empty.apply(&base, 8192, &[false, false]), Ok(Vec::new()));
    }

    /// Otherwise a long list would have to be searched for each grain.
    #[test]
    fn what_repeats_is_found_soon() {
        let line = noise(4, 5000);
        let old: Vec<u8> = line.iter().copied().cycle().take(1 << 20).collect();
        let base = base(&[&old]);
        let wanted = vec![true; 64];
        let patch = Patch::make(&old[77..77 + 262_144], &wanted, &base.names()).unwrap();
        assert!(patch.encode().len() < 2000);
    }

    proptest! {
        #[test]
        fn a_patch_makes_the_wanted_blocks(
            edits in prop::collection::vec((0_usize..40_000, 0_usize..3000, 0_usize..3000), 0..6),
            wanted in prop::collection::vec(any::<bool>(), 11),
            short in 0_usize..4096,
        ) {
            let old = noise(5, 45_056);
            let mut piece = old.clone();
            for (seed, (at, cut, add)) in (10..).zip(edits) {
                let at = at.min(piece.len());
                let end = (at + cut).min(piece.len());
                piece.splice(at..end, noise(seed, add));
            }
            piece.resize(45_056 - short, 7);
            let base = base(&[&old[..20_000], &old[20_000..]]);
            if let Some(patch) = Patch::make(&piece, &wanted, &base.names()) {
                let again = Patch::decode(&patch.encode()).unwrap();
                prop_assert_eq!(&again, &patch);
                let made = again.apply(&base, piece.len(), &wanted);
                prop_assert_eq!(made, Ok(blocks(&piece, &wanted)));
            }
        }

        #[test]
        fn garbage_is_refused_or_fits(garbage in prop::collection::vec(any::<u8>(), 0..60)) {
            let base = base(&[&noise(1, 8192)]);
            if let Ok(patch) = Patch::decode(&garbage.into()) {
                let _ = patch.apply(&base, 8192, &[true, false]);
            }
        }
    }
}
