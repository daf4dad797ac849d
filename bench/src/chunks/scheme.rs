//! Schemes: ways to cut an image and to look for the pieces, and what each finds of a new image.
//!
//! Invariant: what a scheme says is missing, with what it says is there, is all of the new image;
//! and whatever is there is so by a hash of its whole content.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use anyhow::{Context, bail};
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::index::{ChunkIndex, Location};
use longhaul_dedup::pages::{PAGE_BYTES, PageHash};

use super::cut::{Outer, Piece, hash_blocks, lot};
use super::image::Image;
use super::micro::Hint;

/// Memory that an index may take: no scheme is held back by it.
const INDEX_BUDGET_BYTES: usize = 4 << 30;
/// Bytes of one id on the wire.
const ID_BYTES: u64 = 32;
/// Blocks that one summary stands for when both ends compare what they have place by place.
const SUMMARY_BLOCKS: u64 = 256;

/// How an image is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    outer: Outer,
    fine: Option<Fine>,
}

/// How the blocks of a missing piece are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fine {
    /// In an index of every so-manieth block, chosen by its hash, and around what is found there.
    Index(u64),
    /// Without an index: at the same place of the old image, and beside what was found.
    Place,
}

impl FromStr for Scheme {
    type Err = anyhow::Error;

    /// `fixed-64k`, `fastcdc-64k`, `blocks-64k`; with `+4k` a missing piece is looked for by its
    /// blocks, with `+4k/16` by an index of a sixteenth of them, with `+place` without one.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (outer, fine) = text.split_once('+').map_or((text, None), |(o, f)| (o, Some(f)));
        let (kind, size) = outer.split_once('-').context("a scheme is KIND-SIZE")?;
        let kib: u32 = size.strip_suffix('k').context("sizes end in k")?.parse()?;
        if !(4..=256).contains(&kib) || !kib.is_power_of_two() {
            bail!("{text}: sizes are 4k to 256k, powers of two");
        }
        let outer = match kind {
            "fixed" => Outer::Fixed(kib as usize * 1024),
            "fastcdc" => Outer::FastCdc(kib * 1024),
            "blocks" => Outer::Blocks(kib as usize / 4),
            _ => bail!("{text}: a scheme is fixed, fastcdc or blocks"),
        };
        let fine = match fine {
            None => None,
            Some("place") => Some(Fine::Place),
            Some("4k") => Some(Fine::Index(1)),
            Some(part) => {
                let sample = part.strip_prefix("4k/").context("behind + is 4k, 4k/N or place")?;
                let sample: u64 = sample.parse()?;
                if sample == 0 {
                    bail!("{text}: every 0th block is none");
                }
                Some(Fine::Index(sample))
            }
        };
        Ok(Self { outer, fine })
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.outer {
            Outer::Fixed(bytes) => write!(f, "fixed-{}k", bytes >> 10)?,
            Outer::FastCdc(avg) => write!(f, "fastcdc-{}k", avg >> 10)?,
            Outer::Blocks(avg) => write!(f, "blocks-{}k", avg * 4)?,
        }
        match self.fine {
            None => Ok(()),
            Some(Fine::Place) => write!(f, "+place"),
            Some(Fine::Index(1)) => write!(f, "+4k"),
            Some(Fine::Index(sample)) => write!(f, "+4k/{sample}"),
        }
    }
}

/// What a target knows of its old image.
pub struct Known<'a> {
    scheme: Scheme,
    image: &'a Image,
    pieces: ChunkIndex,
    blocks: ChunkIndex,
    hashes: Vec<PageHash>,
}

/// What is not there, and what it took to find out.
#[derive(Debug, Default)]
pub struct Missing {
    /// Bytes of the new image's data, in order, apart from each other.
    pub ranges: Vec<Range<usize>>,
    /// Around which stretches of missing pieces something was found, and where in the old image.
    pub hints: Vec<Hint>,
    /// Pieces that the new image was cut into.
    pub pieces: usize,
    /// Bytes of ids that cross the WAN if all are sent.
    pub ids_flat_bytes: u64,
    /// The same, where a range that both ends have at the same place goes as one id.
    pub ids_bytes: u64,
}

impl Missing {
    /// How many bytes that are.
    pub fn bytes(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }
}

fn insert(index: &mut ChunkIndex, id: &ChunkId, range: Range<usize>) {
    let location = Location { image: 0, offset: range.start as u64, len: range.len() as u32 };
    index.insert(id, location);
}

impl<'a> Known<'a> {
    /// Cuts the old image and indexes it.
    pub fn index(scheme: Scheme, image: &'a Image) -> Self {
        let scan = scheme.outer.scan(image);
        let mut pieces = ChunkIndex::with_budget(INDEX_BUDGET_BYTES);
        let mut blocks = ChunkIndex::with_budget(INDEX_BUDGET_BYTES);
        for piece in &scan.pieces {
            insert(&mut pieces, &piece.id, piece.begin..piece.end);
        }
        let mut hashes = scan.hashes.unwrap_or_default();
        if let Some(fine) = scheme.fine {
            if hashes.is_empty() && fine != Fine::Place {
                hashes = hash_blocks(image, 0..image.len());
            }
            if let Fine::Index(sample) = fine {
                for (block, hash) in hashes.iter().enumerate() {
                    if lot(hash).is_multiple_of(sample) {
                        let begin = block * PAGE_BYTES;
                        insert(&mut blocks, &hash.chunk_id(), begin..begin + PAGE_BYTES);
                    }
                }
            }
        }
        Self { scheme, image, pieces, blocks, hashes }
    }

    /// Places that the index holds, pieces and blocks.
    pub fn entries(&self) -> usize {
        self.pieces.len() + self.blocks.len()
    }

    /// What of a new image is neither in the old one nor earlier in the new one.
    pub fn missing(&self, new: &Image) -> Missing {
        let scan = self.scheme.outer.scan(new);
        let mut sent = ChunkIndex::with_budget(INDEX_BUDGET_BYTES);
        let mut stretches: Vec<Stretch> = Vec::new();
        // From a byte of the new image to the same byte of the old one, at the last piece found.
        let mut shift = None;
        let mut open = false;
        for piece in &scan.pieces {
            let old = self.pieces.lookup(&piece.id).next();
            if old.is_some() || sent.lookup(&piece.id).next().is_some() {
                let found = old.map(|old| old.offset as i64 - piece.begin as i64);
                if let (true, Some(stretch)) = (open, stretches.last_mut()) {
                    stretch.after = found;
                }
                (shift, open) = (found, false);
                continue;
            }
            insert(&mut sent, &piece.id, piece.begin..piece.end);
            match stretches.last_mut() {
                Some(stretch) if open => stretch.range.end = piece.end,
                _ => stretches.push(Stretch {
                    range: piece.begin..piece.end,
                    before: shift,
                    after: None,
                }),
            }
            open = true;
        }
        let mut missing = Missing { pieces: scan.pieces.len(), ..Missing::default() };
        missing.ids_flat_bytes = scan.pieces.len() as u64 * ID_BYTES;
        missing.ids_bytes = self.summarised_ids(new, &scan.pieces);
        missing.hints = stretches.iter().map(Stretch::hint).collect();
        match self.scheme.fine {
            None => missing.ranges = stretches.into_iter().map(|stretch| stretch.range).collect(),
            Some(_) => {
                for stretch in &stretches {
                    self.look_closer(new, scan.hashes.as_deref(), stretch, &mut sent, &mut missing);
                }
            }
        }
        missing
    }

    /// Bytes of ids if ranges that are the same at the same place go as one.
    fn summarised_ids(&self, new: &Image, pieces: &[Piece]) -> u64 {
        let summary = |image: &Image, block: usize| image.place(block) / SUMMARY_BLOCKS;
        let blocks_of = |image: &Image, range: u64| -> Range<usize> {
            let first = image.places_before(range * SUMMARY_BLOCKS);
            first..image.places_before((range + 1) * SUMMARY_BLOCKS)
        };
        let mut last = None;
        let mut same = false;
        let mut ids = 0;
        for piece in pieces {
            let ranges =
                summary(new, piece.begin / PAGE_BYTES)..=summary(new, (piece.end - 1) / PAGE_BYTES);
            let mut all_same = true;
            for range in ranges {
                if last != Some(range) {
                    let (ours, theirs) = (blocks_of(new, range), blocks_of(self.image, range));
                    same = ours.len() == theirs.len()
                        && ours.clone().zip(theirs.clone()).all(|(our, their)| {
                            new.place(our) == self.image.place(their)
                                && new.block(our) == self.image.block(their)
                        });
                    last = Some(range);
                    ids += 1;
                }
                all_same &= same;
            }
            ids += u64::from(!all_same);
        }
        ids * ID_BYTES
    }

    fn look_closer(
        &self,
        new: &Image,
        hashes: Option<&[PageHash]>,
        stretch: &Stretch,
        sent: &mut ChunkIndex,
        missing: &mut Missing,
    ) {
        // Blocks that are wholly inside; what is beside them stays missing.
        let first = stretch.range.start.div_ceil(PAGE_BYTES);
        let blocks = first..(stretch.range.end / PAGE_BYTES).max(first);
        let fresh;
        let hashes = match hashes {
            Some(all) => &all[blocks.clone()],
            None => {
                fresh = hash_blocks(new, blocks.clone());
                &fresh
            }
        };
        missing.ids_flat_bytes += blocks.len() as u64 * ID_BYTES;
        missing.ids_bytes += blocks.len() as u64 * ID_BYTES;
        let mut known = vec![false; blocks.len()];
        let mut shifts: Vec<i64> = [stretch.before, stretch.after].into_iter().flatten().collect();
        shifts.retain(|shift| shift % PAGE_BYTES as i64 == 0);
        for at in 0..blocks.len() {
            let block = blocks.start + at;
            let Some(old) = self.find(new, block, &hashes[at], &shifts) else { continue };
            let shift = (old as i64 - block as i64) * PAGE_BYTES as i64;
            if !shifts.contains(&shift) {
                shifts.insert(0, shift);
                shifts.truncate(4);
            }
            known[at] = true;
            // What lies before it may be the same in both images as well.
            let mut back = 1;
            while back <= at.min(old) && !known[at - back] {
                if !self.is_same(old - back, new.block(block - back), &hashes[at - back]) {
                    break;
                }
                known[at - back] = true;
                back += 1;
            }
        }
        let mut add = |range: Range<usize>| match missing.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.is_empty() => {}
            _ => missing.ranges.push(range),
        };
        add(stretch.range.start..(blocks.start * PAGE_BYTES).min(stretch.range.end));
        for (block, hash) in blocks.clone().zip(hashes) {
            let range = block * PAGE_BYTES..(block + 1) * PAGE_BYTES;
            let is_sent = || sent.lookup(&hash.chunk_id()).next().is_some();
            if !known[block - blocks.start] && !is_sent() {
                insert(sent, &hash.chunk_id(), range.clone());
                add(range);
            }
        }
        add((blocks.end * PAGE_BYTES).max(stretch.range.start)..stretch.range.end);
    }

    /// The block of the old image that is the same, where this scheme can see it.
    fn find(&self, new: &Image, block: usize, hash: &PageHash, shifts: &[i64]) -> Option<usize> {
        if let Some(Fine::Index(sample)) = self.scheme.fine
            && lot(hash).is_multiple_of(sample)
        {
            let found = self.blocks.lookup(&hash.chunk_id()).next();
            if let Some(found) = found {
                return Some(found.offset as usize / PAGE_BYTES);
            }
            if sample == 1 {
                return None;
            }
        }
        let beside = shifts
            .iter()
            .filter_map(|shift| usize::try_from(block as i64 + shift / PAGE_BYTES as i64).ok());
        let mut candidates = beside.chain(self.image.block_at(new.place(block)));
        candidates.find(|old| self.is_same(*old, new.block(block), hash))
    }

    /// Whether an old block is this one; a target without its hash reads the block.
    fn is_same(&self, old: usize, block: &[u8; PAGE_BYTES], hash: &PageHash) -> bool {
        match self.hashes.get(old) {
            Some(known) => known == hash,
            None => old < self.image.len() && self.image.block(old) == block,
        }
    }
}

/// Missing pieces side by side, and where the pieces around them were found.
struct Stretch {
    range: Range<usize>,
    before: Option<i64>,
    after: Option<i64>,
}

impl Stretch {
    fn hint(&self) -> Hint {
        let shifts = [self.before, self.after].into_iter().flatten().collect();
        Hint { range: self.range.clone(), shifts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, blocks: usize) -> Vec<u8> {
        let mut bytes = vec![0; blocks * PAGE_BYTES];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    const ALL: [&str; 9] = [
        "fixed-4k",
        "fixed-64k",
        "fastcdc-16k",
        "blocks-16k",
        "blocks-64k",
        "fixed-64k+4k",
        "fastcdc-64k+4k",
        "blocks-64k+4k/4",
        "blocks-64k+place",
    ];

    fn missing(scheme: &str, old: &[u8], new: &[u8]) -> Missing {
        let (old, new) = (Image::of(old), Image::of(new));
        Known::index(scheme.parse().unwrap(), &old).missing(&new)
    }

    #[test]
    fn a_scheme_is_called_what_it_was_asked_for() {
        for scheme in ALL {
            assert_eq!(scheme.parse::<Scheme>().unwrap().to_string(), scheme);
        }
        for scheme in ["", "fixed", "fixed-5k", "gear-64k", "fixed-4", "blocks-64k+4k/0"] {
            assert!(scheme.parse::<Scheme>().is_err(), "{scheme}");
        }
    }

    #[test]
    fn nothing_is_missing_of_the_same_image_and_everything_of_another() {
        let (old, other) = (noise(1, 96), noise(2, 96));
        for scheme in ALL {
            assert_eq!(missing(scheme, &old, &old).bytes(), 0, "{scheme}");
            assert_eq!(missing(scheme, &old, &other).bytes(), other.len(), "{scheme}");
            // What is twice in the new image goes once.
            let twice = [other.clone(), other.clone()].concat();
            let bytes = missing(scheme, &old, &twice).bytes();
            assert!(bytes < other.len() * 3 / 2, "{scheme} {bytes}");
        }
    }

    #[test]
    fn one_changed_block_is_all_that_two_levels_miss() {
        let old = noise(1, 200);
        let mut new = old.clone();
        new[77 * PAGE_BYTES + 5] ^= 1;
        for scheme in
            ["fixed-4k", "fixed-64k+4k", "blocks-64k+4k", "blocks-64k+4k/4", "blocks-64k+place"]
        {
            let missing = missing(scheme, &old, &new);
            let block = 77 * PAGE_BYTES..78 * PAGE_BYTES;
            assert_eq!(missing.ranges, std::slice::from_ref(&block), "{scheme}");
        }
        assert!(missing("fixed-64k", &old, &new).bytes() > PAGE_BYTES);
        let flat = missing("fixed-4k", &old, &new);
        assert_eq!(flat.ids_flat_bytes, 200 * ID_BYTES);
        assert!(flat.ids_bytes <= flat.ids_flat_bytes + ID_BYTES);
    }

    #[test]
    fn what_moved_by_blocks_is_found() {
        let old = noise(1, 300);
        let new = [noise(2, 3), old[10 * PAGE_BYTES..].to_vec()].concat();
        for scheme in
            ["fixed-4k", "blocks-16k+4k", "blocks-16k+4k/4", "fixed-64k+4k", "fixed-64k+4k/4"]
        {
            let bytes = missing(scheme, &old, &new).bytes();
            assert_eq!(bytes, 3 * PAGE_BYTES, "{scheme}");
        }
        assert!(missing("blocks-16k", &old, &new).bytes() < 40 * PAGE_BYTES);
    }
}
