//! Pieces that are put together at the target: from blocks that lie here and blocks that are sent.
//!
//! Invariant: whatever a block is taken for, a piece is only given out to be written when the hash of
//! all its blocks' hashes is its id. What is held in memory is counted, and the caller asks before it
//! adds more.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use longhaul_dedup::blocks::{BLOCK_BYTES, MAX_PIECE_BYTES, ShortId, hash_blocks, id_of_blocks};
use longhaul_dedup::pages::PageHash;
use longhaul_dedup::patch::{Base, Patch};
use longhaul_dedup::recipe::RecipeEntry;

/// Bytes of found blocks that are held for pieces which miss others; beyond it whole pieces are asked
/// for.
const FOUND_BYTES_MAX: u64 = 128 << 20;
/// Bytes that may be held in all: some blocks of a piece may come in one bundle and some in the next.
const HELD_BYTES_MAX: u64 = FOUND_BYTES_MAX + (64 << 20);
/// Blocks of pieces that are being put together. What was sent for older parcels may be overtaken by
/// what is asked about newer ones.
const BLOCKS_MAX: usize = 1 << 20;
/// Different blocks on their way that others may wait for.
const ON_WAY_MAX: usize = 1 << 18;

/// A block of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Slot {
    /// On its way.
    Missing,
    /// Where it has to be already.
    InPlace(PageHash),
    /// In memory, to be written.
    Here(PageHash, Bytes),
}

impl Slot {
    fn hash(&self) -> Option<PageHash> {
        match self {
            Self::Missing => None,
            Self::InPlace(hash) | Self::Here(hash, _) => Some(*hash),
        }
    }

    fn held(&self) -> u64 {
        match self {
            Self::Here(_, data) => data.len() as u64,
            _ => 0,
        }
    }
}

/// A piece that is being put together.
#[derive(Debug)]
struct Assembly {
    entry: RecipeEntry,
    slots: Vec<Slot>,
    named: Option<Box<Named>>,
}

/// What the source was told of a piece.
#[derive(Debug)]
struct Named {
    base: Base,
    wanted: Vec<bool>,
}

/// A piece that is complete.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// It is what it should be.
    Right(MadePiece),
    /// A block was taken for another one.
    Wrong(RecipeEntry),
}

/// A checked piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MadePiece {
    /// Its place and id.
    pub(super) entry: RecipeEntry,
    /// Its blocks' hashes.
    pub(super) hashes: Vec<PageHash>,
    /// What is not in place yet: first byte and content.
    pub(super) writes: Vec<(u64, Vec<Bytes>)>,
}

/// Something that an honest source does not do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Misuse {
    #[error("it sends blocks at {0} that nobody asked for")]
    Unasked(u64),
    #[error("more is being put together than it may ask for at once")]
    TooMuch,
}

/// The pieces under way.
#[derive(Debug, Default)]
pub(super) struct Assemblies {
    open: BTreeMap<(u16, u64), Assembly>,
    held: u64,
    blocks: usize,
    /// Blocks that were asked for, each with the slots that wait for it besides.
    on_way: HashMap<ShortId, Vec<(u16, u64, usize)>>,
}

impl Assembly {
    fn held(&self) -> u64 {
        let base = self.named.as_ref().map_or(0, |named| named.base.bytes());
        self.slots.iter().map(Slot::held).sum::<u64>() + base
    }

    /// What it came to, once no block is missing.
    fn finish(self) -> Result<Made, Self> {
        let hashes: Option<Vec<PageHash>> = self.slots.iter().map(Slot::hash).collect();
        let Some(hashes) = hashes else { return Err(self) };
        if id_of_blocks(&hashes) != self.entry.id {
            return Ok(Made::Wrong(self.entry));
        }
        let mut writes: Vec<(u64, Vec<Bytes>)> = Vec::new();
        let mut open = false;
        for (block, slot) in self.slots.into_iter().enumerate() {
            match slot {
                Slot::Here(_, data) => {
                    match writes.last_mut() {
                        Some((_, run)) if open => run.push(data),
                        _ => {
                            let offset = self.entry.offset + (block * BLOCK_BYTES) as u64;
                            writes.push((offset, vec![data]));
                        }
                    }
                    open = true;
                }
                _ => open = false,
            }
        }
        Ok(Made::Right(MadePiece { entry: self.entry, hashes, writes }))
    }
}

impl Assemblies {
    /// Whether found blocks may be held.
    pub(super) fn has_room(&self) -> bool {
        self.held < FOUND_BYTES_MAX
    }

    /// Begins a piece of which some blocks were found; says for each block whether it is wanted, and
    /// gives the piece back if it is complete. A complete one that is wrong is begun anew: all of its
    /// blocks are wanted.
    pub(super) fn begin(
        &mut self,
        disk: u16,
        entry: RecipeEntry,
        ids: &[ShortId],
        found: Vec<Slot>,
    ) -> Result<(Vec<bool>, Option<MadePiece>), Misuse> {
        let assembly = match (Assembly { entry, slots: found, named: None }).finish() {
            Ok(Made::Right(made)) => return Ok((vec![false; ids.len()], Some(made))),
            Ok(Made::Wrong(entry)) => {
                Assembly { entry, slots: vec![Slot::Missing; ids.len()], named: None }
            }
            Err(assembly) => assembly,
        };
        let key = (disk, entry.offset);
        let wanted = assembly
            .slots
            .iter()
            .zip(ids)
            .enumerate()
            .map(|(block, (slot, id))| {
                if *slot != Slot::Missing {
                    return false;
                }
                // The last block of a disk has its length in no id.
                if entry.block_len(block) == BLOCK_BYTES {
                    if let Some(waiting) = self.on_way.get_mut(id) {
                        waiting.push((disk, entry.offset, block));
                        return false;
                    }
                    if self.on_way.len() < ON_WAY_MAX {
                        self.on_way.insert(*id, Vec::new());
                    }
                }
                true
            })
            .collect();
        self.blocks += assembly.slots.len();
        self.held += assembly.held();
        if let Some(old) = self.open.insert(key, assembly) {
            self.blocks -= old.slots.len();
            self.held -= old.held();
        }
        if self.blocks > BLOCKS_MAX || self.held > HELD_BYTES_MAX {
            return Err(Misuse::TooMuch);
        }
        Ok((wanted, None))
    }

    /// Keeps what is similar to a piece that was begun, and of which these blocks are wanted.
    pub(super) fn set_base(&mut self, disk: u16, offset: u64, base: Base, wanted: &[bool]) {
        if let Some(assembly) = self.open.get_mut(&(disk, offset)) {
            self.held += base.bytes();
            assembly.named = Some(Box::new(Named { base, wanted: wanted.to_vec() }));
        }
    }

    /// Takes in a patch that was sent; gives the pieces that are complete now. One that makes something
    /// else than the piece is no misuse: grains are told apart by little.
    pub(super) fn put_patch(
        &mut self,
        disk: u16,
        offset: u64,
        patch: &Patch,
    ) -> Result<Vec<(u16, Made)>, Misuse> {
        let key = (disk, offset);
        let assembly = self.open.get_mut(&key).ok_or(Misuse::Unasked(offset))?;
        let Named { base, wanted } = *assembly.named.take().ok_or(Misuse::Unasked(offset))?;
        self.held -= base.bytes();
        let entry = assembly.entry;
        let Ok(blocks) = patch.apply(&base, entry.len as usize, &wanted) else {
            self.remove(key);
            return Ok(vec![(disk, Made::Wrong(entry))]);
        };
        let places = (0..wanted.len()).filter(|block| wanted[*block]);
        let mut made = Vec::new();
        for (block, data) in places.zip(blocks) {
            // One block has one hash.
            let hash = hash_blocks(&data)[0];
            self.fill_all(key, block, hash, data, &mut made);
        }
        self.checked(made)
    }

    /// Takes in blocks that were sent; gives the pieces that are complete now.
    pub(super) fn put(
        &mut self,
        disk: u16,
        offset: u64,
        data: &Bytes,
    ) -> Result<Vec<(u16, Made)>, Misuse> {
        let (&key, assembly) =
            self.open.range(..=(disk, offset)).next_back().ok_or(Misuse::Unasked(offset))?;
        let end = assembly.entry.offset + u64::from(assembly.entry.len);
        let within = key.0 == disk
            && offset + data.len() as u64 <= end
            && (offset - key.1).is_multiple_of(BLOCK_BYTES as u64)
            && (data.len().is_multiple_of(BLOCK_BYTES) || offset + data.len() as u64 == end);
        if !within {
            return Err(Misuse::Unasked(offset));
        }
        let first = ((offset - key.1) / BLOCK_BYTES as u64) as usize;
        let mut made = Vec::new();
        for (block, hash) in hash_blocks(data).into_iter().enumerate() {
            let at = block * BLOCK_BYTES;
            let content = data.slice(at..data.len().min(at + BLOCK_BYTES));
            self.fill_all(key, first + block, hash, content, &mut made);
        }
        self.checked(made)
    }

    fn checked(&self, made: Vec<(u16, Made)>) -> Result<Vec<(u16, Made)>, Misuse> {
        if self.held > HELD_BYTES_MAX { Err(Misuse::TooMuch) } else { Ok(made) }
    }

    /// Fills a slot, and those that wait for the same block.
    fn fill_all(
        &mut self,
        key: (u16, u64),
        block: usize,
        hash: PageHash,
        content: Bytes,
        made: &mut Vec<(u16, Made)>,
    ) {
        for (disk, offset, other) in self.on_way.remove(&ShortId::of(&hash)).unwrap_or_default() {
            // A copy of its own: it must not keep a whole bundle in memory.
            let content = Bytes::copy_from_slice(&content);
            made.extend(self.fill((disk, offset), other, Slot::Here(hash, content)));
        }
        made.extend(self.fill(key, block, Slot::Here(hash, content)));
    }

    fn fill(&mut self, key: (u16, u64), block: usize, with: Slot) -> Option<(u16, Made)> {
        let assembly = self.open.get_mut(&key)?;
        let slot = assembly.slots.get_mut(block).filter(|slot| **slot == Slot::Missing)?;
        if with.held() != assembly.entry.block_len(block) as u64 {
            return None;
        }
        self.held += with.held();
        *slot = with;
        if assembly.slots.contains(&Slot::Missing) {
            return None;
        }
        let assembly = self.remove(key)?;
        assembly.finish().ok().map(|made| (key.0, made))
    }

    fn remove(&mut self, key: (u16, u64)) -> Option<Assembly> {
        let assembly = self.open.remove(&key)?;
        self.held -= assembly.held();
        self.blocks -= assembly.slots.len();
        Some(assembly)
    }

    /// Drops what is being put together where something else is written.
    pub(super) fn overwritten(&mut self, disk: u16, range: &Range<u64>) {
        if self.open.is_empty() {
            return;
        }
        let reach = range.start.saturating_sub(u64::from(MAX_PIECE_BYTES));
        let stale: Vec<(u16, u64)> = self
            .open
            .range((disk, reach)..(disk, range.end))
            .filter(|(_, assembly)| {
                assembly.entry.offset + u64::from(assembly.entry.len) > range.start
            })
            .map(|(key, _)| *key)
            .collect();
        for key in stale {
            self.remove(key);
        }
    }

    /// Gives up everything of a disk that did not come together.
    pub(super) fn give_up(&mut self, disk: u16) -> Vec<RecipeEntry> {
        self.on_way.clear();
        let keys: Vec<(u16, u64)> =
            self.open.range((disk, 0)..=(disk, u64::MAX)).map(|(key, _)| *key).collect();
        keys.into_iter().filter_map(|key| self.remove(key)).map(|open| open.entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use longhaul_dedup::blocks::piece_id;

    use super::*;

    fn blocks(letters: &[u8]) -> Bytes {
        letters.iter().flat_map(|letter| vec![*letter; BLOCK_BYTES]).collect()
    }

    fn entry(offset: u64, data: &Bytes) -> RecipeEntry {
        RecipeEntry { offset, len: data.len() as u32, id: piece_id(data) }
    }

    fn ids(data: &Bytes) -> Vec<ShortId> {
        hash_blocks(data).iter().map(ShortId::of).collect()
    }

    fn here(letter: u8) -> Slot {
        let data = blocks(&[letter]);
        Slot::Here(hash_blocks(&data)[0], data)
    }

    fn in_place(letter: u8) -> Slot {
        Slot::InPlace(hash_blocks(&blocks(&[letter]))[0])
    }

    #[test]
    fn a_piece_is_written_where_it_differs_once_it_is_right() {
        let mut all = Assemblies::default();
        let data = blocks(b"abcd");
        let found = vec![in_place(b'a'), here(b'b'), Slot::Missing, in_place(b'd')];
        let (wanted, made) = all.begin(0, entry(8192, &data), &ids(&data), found).unwrap();
        assert_eq!((wanted, made), (vec![false, false, true, false], None));
        assert!(all.put(0, 8192, &blocks(b"abcdabcd")).is_err());
        assert!(all.put(1, 8192, &blocks(b"c")).is_err());
        let mut made = all.put(0, 8192 + 8192, &blocks(b"c")).unwrap();
        let (0, Made::Right(made)) = made.remove(0) else { panic!("{made:?}") };
        assert_eq!(made.writes, [(8192 + 4096, vec![blocks(b"b"), blocks(b"c")])]);
        assert_eq!((all.held, all.blocks), (0, 0));
        assert!(all.put(0, 8192 + 8192, &blocks(b"c")).is_err());
    }

    #[test]
    fn a_block_that_was_taken_for_another_is_found_out() {
        let mut all = Assemblies::default();
        let data = blocks(b"ab");
        let found = vec![here(b'x'), Slot::Missing];
        all.begin(0, entry(0, &data), &ids(&data), found).unwrap();
        let made = all.put(0, 4096, &blocks(b"b")).unwrap();
        assert_eq!(made, [(0, Made::Wrong(entry(0, &data)))]);
        // One that seemed to be complete is asked for whole.
        let found = vec![here(b'x'), here(b'b')];
        let (wanted, made) = all.begin(0, entry(0, &data), &ids(&data), found).unwrap();
        assert_eq!((wanted, made), (vec![true, true], None));
        let made = all.put(0, 0, &data).unwrap();
        assert!(matches!(made[..], [(0, Made::Right(_))]));
    }

    #[test]
    fn a_block_on_its_way_is_asked_for_once() {
        let mut all = Assemblies::default();
        let (one, two) = (blocks(b"aba"), blocks(b"cb"));
        let missing = |count| vec![Slot::Missing; count];
        let (wanted, _) = all.begin(0, entry(0, &one), &ids(&one), missing(3)).unwrap();
        assert_eq!(wanted, [true, true, false]);
        let (wanted, _) = all.begin(0, entry(1 << 20, &two), &ids(&two), missing(2)).unwrap();
        assert_eq!(wanted, [true, false]);
        assert_eq!(all.put(0, 1 << 20, &blocks(b"c")).unwrap(), []);
        let made = all.put(0, 0, &blocks(b"ab")).unwrap();
        assert_eq!(made.len(), 2);
        assert!(made.iter().all(|(_, made)| matches!(made, Made::Right(_))));
    }

    #[test]
    fn what_does_not_come_together_is_given_up() {
        let mut all = Assemblies::default();
        let data = blocks(b"ab");
        for (disk, offset) in [(0, 0), (0, 8192), (1, 0)] {
            let found = vec![here(b'a'), Slot::Missing];
            all.begin(disk, entry(offset, &data), &ids(&data), found).unwrap();
        }
        all.overwritten(0, &(4096..8192));
        assert_eq!(all.give_up(0), [entry(8192, &data)]);
        assert_eq!(all.give_up(1), [entry(0, &data)]);
        assert_eq!((all.held, all.blocks), (0, 0));
    }
}
