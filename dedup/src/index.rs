//! Where on this host a chunk may be found, in images that are here anyway.
//!
//! Invariant: an answer is a hint. The index keeps 64 bits of each id and never looks at the
//! images, so whoever follows a hint hashes what is there; a stale or mistaken one is a miss, and
//! [`ChunkIndex::forget`] removes it.

use std::hash::{BuildHasher, RandomState};

use crate::id::ChunkId;

/// Places that are kept for one chunk: enough to survive a few images being overwritten, few enough
/// that a chunk which is everywhere (a file system's empty table) does not fill the index.
pub const MAX_LOCATIONS: usize = 4;

/// Memory for one place, in bytes. Tables double when they are 87 % full, so an index
/// takes between 27 and 55 bytes for each place that it holds, and half as much again while it
/// grows.
pub const BYTES_PER_SLOT: usize = size_of::<Slot>();

const LOAD_PERCENT: usize = 87;
const MIN_SLOTS: usize = 1024;

/// A place where a chunk may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The image, by the caller's numbering.
    pub image: u16,
    /// First byte in the image as a guest sees it.
    pub offset: u64,
    /// The chunk's length in bytes.
    pub len: u32,
}

/// 24 bytes. `len` is 0 in an empty slot: no chunk is.
#[derive(Debug, Clone, Copy)]
struct Slot {
    key: u64,
    offset: u64,
    len: u32,
    image: u16,
}

const EMPTY: Slot = Slot { key: 0, offset: 0, len: 0, image: 0 };

impl Slot {
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn location(&self) -> Location {
        Location { image: self.image, offset: self.offset, len: self.len }
    }
}

/// From chunk ids to places, in bounded memory.
///
/// An open-addressed table with linear probing. Whoever chooses the content of a guest's disk also
/// chooses ids, so slots depend on a seed of this process: nobody outside can make them collide.
pub struct ChunkIndex {
    /// A power of two of slots, at least one of them empty.
    slots: Vec<Slot>,
    used: usize,
    max_slots: usize,
    seed: u64,
    refused: u64,
}

/// What became of a place that was offered to the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Insertion {
    /// It is kept.
    Added,
    /// It was there already.
    Known,
    /// There are [`MAX_LOCATIONS`] places for this chunk already.
    Enough,
    /// The memory budget is used up.
    Full,
}

impl ChunkIndex {
    /// An empty index that never takes more than about `budget_bytes` (but at least 24 KiB).
    pub fn with_budget(budget_bytes: usize) -> Self {
        let affordable = (budget_bytes / BYTES_PER_SLOT).max(MIN_SLOTS);
        // Rounded down to a power of two.
        let max_slots = 1 << affordable.ilog2();
        Self {
            slots: vec![EMPTY; MIN_SLOTS],
            used: 0,
            max_slots,
            seed: RandomState::new().hash_one("chunk index"),
            refused: 0,
        }
    }

    /// Adds a place for a chunk. Earlier places are tried first.
    pub fn insert(&mut self, id: &ChunkId, location: Location) -> Insertion {
        if location.len == 0 {
            return Insertion::Known;
        }
        let key = key(id);
        let mut known = 0;
        for slot in self.probe(key) {
            if slot.location() == location {
                return Insertion::Known;
            }
            known += 1;
        }
        if known >= MAX_LOCATIONS {
            return Insertion::Enough;
        }
        if (self.used + 1) * 100 > self.slots.len() * LOAD_PERCENT && !self.grow() {
            self.refused += 1;
            return Insertion::Full;
        }
        let Location { image, offset, len } = location;
        self.place(Slot { key, offset, len, image });
        Insertion::Added
    }

    /// Removes a place that turned out to hold something else.
    pub fn forget(&mut self, id: &ChunkId, location: &Location) {
        let key = key(id);
        let mut at = self.home(key);
        while !self.slots[at].is_empty() {
            if self.slots[at].key == key && self.slots[at].location() == *location {
                self.remove(at);
                return;
            }
            at = self.next(at);
        }
    }

    /// Removes every place in an image that is gone or was put to other use.
    pub fn forget_image(&mut self, image: u16) {
        let slots = std::mem::replace(&mut self.slots, vec![EMPTY; MIN_SLOTS]);
        self.used = 0;
        let kept = |slot: &&Slot| !slot.is_empty() && slot.image != image;
        let needed = slots.iter().filter(kept).count() * 100 / LOAD_PERCENT + 1;
        let fitting = needed.next_power_of_two().clamp(MIN_SLOTS, slots.len());
        self.slots.resize(fitting, EMPTY);
        // In table order from behind an empty slot, places of one chunk keep their order.
        let begin = slots.iter().position(Slot::is_empty).unwrap_or(0);
        let (before, after) = slots.split_at(begin);
        after.iter().chain(before).filter(kept).for_each(|slot| self.place(*slot));
    }

    /// The places where a chunk may be, in the order in which they were added.
    pub fn lookup(&self, id: &ChunkId) -> impl Iterator<Item = Location> + '_ {
        self.probe(key(id)).map(Slot::location)
    }

    /// Places that are kept.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether no place is known.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Memory that the table takes, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.slots.len() * BYTES_PER_SLOT
    }

    /// Places that were not kept for lack of memory.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    fn probe(&self, key: u64) -> impl Iterator<Item = &Slot> + '_ {
        let home = self.home(key);
        let (before, after) = self.slots.split_at(home);
        let from_home = after.iter().chain(before);
        from_home.take_while(|slot| !slot.is_empty()).filter(move |slot| slot.key == key)
    }

    fn home(&self, key: u64) -> usize {
        // The product's high bits depend on all bits of the key and on the secret factor.
        let mixed = (key ^ self.seed).wrapping_mul(self.seed.rotate_left(32) | 1);
        (mixed >> (64 - self.slots.len().ilog2())) as usize
    }

    fn next(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }

    fn place(&mut self, slot: Slot) {
        let mut at = self.home(slot.key);
        while !self.slots[at].is_empty() {
            at = self.next(at);
        }
        self.slots[at] = slot;
        self.used += 1;
    }

    /// Empties a slot and closes the gap, so that no probe ends early.
    fn remove(&mut self, mut gap: usize) {
        let mask = self.slots.len() - 1;
        let mut at = self.next(gap);
        while !self.slots[at].is_empty() {
            let home = self.home(self.slots[at].key);
            // Movable unless its home lies (cyclically) behind the gap.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                self.slots[gap] = self.slots[at];
                gap = at;
            }
            at = self.next(at);
        }
        self.slots[gap] = EMPTY;
        self.used -= 1;
    }

    fn grow(&mut self) -> bool {
        if self.slots.len() >= self.max_slots {
            return false;
        }
        let larger = vec![EMPTY; self.slots.len() * 2];
        let slots = std::mem::replace(&mut self.slots, larger);
        self.used = 0;
        let begin = slots.iter().position(Slot::is_empty).unwrap_or(0);
        let (before, after) = slots.split_at(begin);
        let full = after.iter().chain(before).filter(|slot| !slot.is_empty());
        full.for_each(|slot| self.place(*slot));
        true
    }
}

impl std::fmt::Debug for ChunkIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkIndex")
            .field("places", &self.used)
            .field("memory_bytes", &self.memory_bytes())
            .field("refused", &self.refused)
            .finish()
    }
}

fn key(id: &ChunkId) -> u64 {
    u64::from_le_bytes(*id.as_bytes().first_chunk().expect("an id is longer than a key"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> ChunkId {
        ChunkId::of(&n.to_le_bytes())
    }

    fn at(image: u16, offset: u64) -> Location {
        Location { image, offset, len: 65536 }
    }

    #[test]
    fn a_slot_takes_24_bytes() {
        assert_eq!(BYTES_PER_SLOT, 24);
    }

    #[test]
    fn places_come_in_the_order_they_were_added_up_to_a_limit() {
        let mut index = ChunkIndex::with_budget(0);
        for image in 0..MAX_LOCATIONS as u16 {
            assert_eq!(index.insert(&id(1), at(image, 0)), Insertion::Added);
            assert_eq!(index.insert(&id(1), at(image, 0)), Insertion::Known);
        }
        assert_eq!(index.insert(&id(1), at(9, 0)), Insertion::Enough);
        index.forget(&id(1), &at(1, 0));
        let images: Vec<u16> = index.lookup(&id(1)).map(|location| location.image).collect();
        assert_eq!(images, [0, 2, 3]);
        assert_eq!(index.lookup(&id(2)).next(), None);
    }

    #[test]
    fn the_budget_is_kept_and_what_did_not_fit_is_counted() {
        let budget = 100_000 * BYTES_PER_SLOT;
        let mut index = ChunkIndex::with_budget(budget);
        let added = (0..100_000)
            .filter(|n| index.insert(&id(*n), at(0, n * 65536)) == Insertion::Added)
            .count();
        assert!(index.memory_bytes() <= budget);
        assert_eq!(added, 65536 * LOAD_PERCENT / 100);
        assert_eq!(index.refused(), 100_000 - added as u64);
        assert!((0..added as u64).all(|n| index.lookup(&id(n)).next() == Some(at(0, n * 65536))));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u64, u16),
        Forget(u64, u16),
        ForgetImage(u16),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            20 => (0_u64..400, 0_u16..6).prop_map(|(n, image)| Op::Insert(n, image)),
            8 => (0_u64..400, 0_u16..6).prop_map(|(n, image)| Op::Forget(n, image)),
            1 => (0_u16..6).prop_map(Op::ForgetImage),
        ]
    }

    proptest! {
        #[test]
        fn it_answers_like_a_list(ops in prop::collection::vec(op(), 0..2500)) {
            let mut index = ChunkIndex::with_budget(1 << 20);
            let mut model: Vec<(u64, Location)> = Vec::new();
            for op in ops {
                match op {
                    Op::Insert(n, image) => {
                        let of_chunk = model.iter().filter(|(chunk, _)| *chunk == n);
                        let expected = if model.contains(&(n, at(image, n))) {
                            Insertion::Known
                        } else if of_chunk.count() >= MAX_LOCATIONS {
                            Insertion::Enough
                        } else {
                            model.push((n, at(image, n)));
                            Insertion::Added
                        };
                        prop_assert_eq!(index.insert(&id(n), at(image, n)), expected);
                    }
                    Op::Forget(n, image) => {
                        index.forget(&id(n), &at(image, n));
                        model.retain(|known| *known != (n, at(image, n)));
                    }
                    Op::ForgetImage(image) => {
                        index.forget_image(image);
                        model.retain(|(_, location)| location.image != image);
                    }
                }
                prop_assert_eq!(index.len(), model.len());
            }
            for n in 0..400 {
                let expected: Vec<Location> = model
                    .iter()
                    .filter(|(chunk, _)| *chunk == n)
                    .map(|(_, location)| *location)
                    .collect();
                prop_assert_eq!(index.lookup(&id(n)).collect::<Vec<_>>(), expected);
            }
        }
    }
}
