//! What the target's disks hold, block by block, for pages of memory that are the same: the guest's own
//! cache of its files, mostly.
//!
//! Invariant: what is in here is a hint. A page that goes as the name of a block is kept until the
//! target has proven it, and goes in full if it cannot. Memory is bounded by a share of the guest's.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use longhaul_dedup::blocks::{BLOCK_BYTES, Scan};
use longhaul_dedup::pagebatch::BlockAt;
use longhaul_dedup::pages::{PAGE_BYTES, PageHash};

/// The part of the guest's memory that the index may take here.
const MEMORY_SHARE: u64 = 20;
/// What a block takes in the index, on average.
const ENTRY_BYTES: u64 = 37;
/// What is written to a disk spoils so much around it: a set of blocks would be large.
const SPOILED_BYTES: u64 = 64 << 10;
/// Wrong hints after which no more are given: the disks change faster than is known here.
const WRONG_MAX: u32 = 3;

const _: () = assert!(PAGE_BYTES == BLOCK_BYTES);

/// Blocks of the target's disks, by their content.
#[derive(Debug)]
pub(in super::super) struct KnownBlocks(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// For each disk: whether the target can read single blocks of it.
    readable: Vec<bool>,
    by_hash: HashMap<u64, BlockAt>,
    room: usize,
    /// The disks were sent whole; what is sent from now on takes the place of what is known.
    is_over: bool,
    /// Stretches that were sent again, by their numbers.
    spoiled: HashSet<(u16, u64)>,
    wrong: u32,
}

impl KnownBlocks {
    /// Nothing yet, for a guest with so much memory.
    pub(in super::super) fn new(memory_bytes: u64) -> Self {
        let room = memory_bytes / MEMORY_SHARE / ENTRY_BYTES;
        Self(Mutex::new(Inner { room: room as usize, ..Inner::default() }))
    }

    /// Disks of which the target can read single blocks.
    pub(in super::super) fn readable(&self, readable: Vec<bool>) {
        self.inner().readable = readable;
    }

    /// These blocks and zeros of a disk are sent, or known to be there.
    pub(in super::super) fn note(&self, disk: u16, scan: &Scan, zeros: &[Range<u64>]) {
        let mut inner = self.inner();
        if inner.room == 0
            || !inner.readable.get(usize::from(disk)).is_some_and(|readable| *readable)
        {
            return;
        }
        if inner.is_over {
            let pieces = scan.pieces.iter().map(|piece| piece.range());
            for range in pieces.chain(zeros.iter().cloned()) {
                let stretches = range.start / SPOILED_BYTES..range.end.div_ceil(SPOILED_BYTES);
                // A guest may give back a disk at once: rather no names than a set without bound.
                let more = (stretches.end - stretches.start) as usize;
                if inner.spoiled.len() + more > inner.room {
                    return inner.give_up();
                }
                inner.spoiled.extend(stretches.map(|stretch| (disk, stretch)));
            }
            return;
        }
        for piece in &scan.pieces {
            let whole = piece.len as usize / BLOCK_BYTES;
            let first = piece.offset / BLOCK_BYTES as u64;
            for (block, hash) in (first..).zip(&scan.hashes[piece.hashes.clone()]).take(whole) {
                if inner.by_hash.len() >= inner.room {
                    return;
                }
                inner.by_hash.insert(short(hash), BlockAt { disk, block });
            }
        }
    }

    /// The disks are sent whole.
    pub(in super::super) fn is_over(&self) {
        self.inner().is_over = true;
    }

    /// A block at the target that has this content.
    pub(super) fn find(&self, hash: &PageHash) -> Option<BlockAt> {
        let inner = self.inner();
        let found = *inner.by_hash.get(&short(hash))?;
        let stretch = found.block * BLOCK_BYTES as u64 / SPOILED_BYTES;
        (!inner.spoiled.contains(&(found.disk, stretch))).then_some(found)
    }

    /// A hint was wrong.
    pub(super) fn was_wrong(&self) {
        let mut inner = self.inner();
        inner.wrong += 1;
        if inner.wrong >= WRONG_MAX {
            inner.give_up();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// No hints any more.
    fn give_up(&mut self) {
        (self.by_hash, self.spoiled, self.room) = (HashMap::new(), HashSet::new(), 0);
    }
}

/// Enough of a hash for a hint.
pub(super) fn short(hash: &PageHash) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use longhaul_dedup::blocks::scan;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn blocks_are_found_until_they_are_sent_again() {
        let data = noise(1 << 20);
        let of = |block: usize| {
            let block = data[block * BLOCK_BYTES..][..BLOCK_BYTES].as_array().unwrap();
            PageHash::of(block)
        };
        let known = KnownBlocks::new(1 << 30);
        let all = scan(&[(0, Bytes::from(data.clone()))]);
        known.note(0, &all, &[]);
        assert_eq!(known.find(&of(3)), None, "nobody can read disk 0 there");
        known.readable(vec![true]);
        known.note(0, &all, &[]);
        assert_eq!(known.find(&of(3)), Some(BlockAt { disk: 0, block: 3 }));
        known.is_over();
        let zeros = SPOILED_BYTES..SPOILED_BYTES + 4096;
        known.note(0, &scan(&[]), std::slice::from_ref(&zeros));
        assert_eq!(known.find(&of(3)), Some(BlockAt { disk: 0, block: 3 }));
        assert_eq!(known.find(&of(16)), None);
        assert_eq!(known.find(&of(31)), None);
        assert!(known.find(&of(32)).is_some());
        for _ in 0..WRONG_MAX {
            known.was_wrong();
        }
        assert_eq!(known.find(&of(3)), None);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let known = KnownBlocks::new(10 * MEMORY_SHARE * ENTRY_BYTES);
        known.readable(vec![true]);
        known.note(0, &scan(&[(0, Bytes::from(noise(1 << 20)))]), &[]);
        assert_eq!(known.inner().by_hash.len(), 10);
    }
}
