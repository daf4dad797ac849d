//! What one series was in the last two weeks: a file of fixed size, a pair of figures for each five minutes.
//!
//! Invariant: the file is a ring; the slot of its newest pair is written after the pair, so a crash costs that
//! pair and nothing else. A slot in which nothing was seen is not a number, never a zero, and what is not such
//! a file is begun anew. Times that go backwards write nothing; after more than a day of them it was the clock
//! that was ahead, and the ring is begun anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Length of a slot in seconds.
pub(crate) const SLOT_S: i64 = 300;
/// Slots of a day, and those that are kept.
pub(crate) const PER_DAY: usize = 288;
const SLOTS: usize = 15 * PER_DAY;
/// `LHPROF1`, a zero, and the newest slot as a number of eight bytes; then the pairs, two `f32` each. All
/// numbers are little-endian.
const MAGIC: [u8; 8] = *b"LHPROF1\0";
const HEAD_BYTES: usize = 16;
const PAIR_BYTES: usize = 8;
/// Slots that are written one by one; of more the whole file is.
const FEW: usize = 16;
const FILE_BYTES: usize = HEAD_BYTES + SLOTS * PAIR_BYTES;

/// Two figures that are seen together.
pub(crate) type Pair = [f32; 2];

/// What was seen of one series.
#[derive(Debug)]
pub(crate) struct Profile {
    file: File,
    /// By slot modulo their number.
    ring: Vec<Pair>,
    newest: Option<i64>,
}

impl Profile {
    /// What `path` holds; a new one if there is none, or if it is no such file.
    ///
    /// # Errors
    /// The file can be neither read nor made.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = file.open(path)?;
        let empty = vec![[f32::NAN; 2]; SLOTS];
        let mut profile = Self { file, ring: empty, newest: None };
        if !profile.load()? {
            profile.file.set_len(0)?;
            profile.file.set_len(FILE_BYTES as u64)?;
        }
        Ok(profile)
    }

    fn load(&mut self) -> io::Result<bool> {
        if self.file.metadata()?.len() != FILE_BYTES as u64 {
            return Ok(false);
        }
        let mut bytes = vec![0; FILE_BYTES];
        self.file.read_exact_at(&mut bytes, 0)?;
        let (head, pairs) = bytes.split_at(HEAD_BYTES);
        if head[..8] != MAGIC {
            return Ok(false);
        }
        let newest = i64::from_le_bytes(head[8..].try_into().map_err(io::Error::other)?);
        for (place, bytes) in self.ring.iter_mut().zip(pairs.chunks_exact(PAIR_BYTES)) {
            let [a, b, c, d, e, f, g, h] = *bytes else { continue };
            let pair = [f32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h])];
            *place = pair.map(|value| if value >= 0.0 { value } else { f32::NAN });
        }
        self.newest = Some(newest);
        Ok(true)
    }

    /// Notes what was seen in a slot; one that is not after the newest is ignored.
    ///
    /// # Errors
    /// The disk does not take it; it is known until the agent ends.
    pub(crate) fn put(&mut self, slot: i64, pair: Pair) -> io::Result<()> {
        let gone = match self.newest {
            Some(newest) if slot <= newest && slot > newest.saturating_sub(PER_DAY as i64) => {
                return Ok(());
            }
            Some(newest) if slot <= newest => slot - SLOTS as i64 + 1..slot,
            Some(newest) => (newest + 1).max(slot - SLOTS as i64 + 1)..slot,
            None => slot - SLOTS as i64 + 1..slot,
        };
        let few = gone.clone().count() <= FEW;
        for slot in gone.clone() {
            self.ring[place(slot)] = [f32::NAN; 2];
        }
        self.ring[place(slot)] = pair;
        self.newest = Some(slot);
        if few {
            for slot in gone.chain([slot]) {
                let place = place(slot);
                let bytes = pair_bytes(self.ring[place]);
                self.file.write_all_at(&bytes, (HEAD_BYTES + place * PAIR_BYTES) as u64)?;
            }
        } else {
            let pairs: Vec<u8> = self.ring.iter().copied().flat_map(pair_bytes).collect();
            self.file.write_all_at(&pairs, HEAD_BYTES as u64)?;
        }
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&MAGIC);
        head[8..].copy_from_slice(&slot.to_le_bytes());
        self.file.write_all_at(&head, 0)
    }

    /// The newest slot of which something is known.
    pub(crate) fn newest(&self) -> Option<i64> {
        self.newest
    }

    /// All slots before `slot` from the oldest kept on, the newest last; not a number where nothing was seen.
    pub(crate) fn before(&self, slot: i64) -> impl Iterator<Item = (i64, Pair)> + '_ {
        let newest = self.newest.unwrap_or(i64::MIN);
        let from = slot - SLOTS as i64;
        (from..slot).map(move |at| {
            let is_kept = at <= newest && at > newest.saturating_sub(SLOTS as i64);
            (at, if is_kept { self.ring[place(at)] } else { [f32::NAN; 2] })
        })
    }
}

fn pair_bytes(pair: Pair) -> [u8; PAIR_BYTES] {
    let mut bytes = [0; PAIR_BYTES];
    bytes[..4].copy_from_slice(&pair[0].to_le_bytes());
    bytes[4..].copy_from_slice(&pair[1].to_le_bytes());
    bytes
}

fn place(slot: i64) -> usize {
    slot.rem_euclid(SLOTS as i64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: i64 = 5_000_000;

    fn newest_values(profile: &Profile, before: i64, count: usize) -> Vec<f32> {
        let all: Vec<f32> = profile.before(before).map(|(_, pair)| pair[0]).collect();
        assert_eq!(all.len(), SLOTS);
        all[SLOTS - count..].to_vec()
    }

    #[test]
    fn what_was_put_is_there_after_a_restart_and_gaps_are_known_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db1");
        let mut profile = Profile::open(&path).unwrap();
        assert_eq!(profile.newest(), None);
        profile.put(SLOT, [1.0, 2.0]).unwrap();
        profile.put(SLOT + 2, [3.0, 4.0]).unwrap();
        profile.put(SLOT + 1, [9.0, 9.0]).unwrap();
        drop(profile);
        let profile = Profile::open(&path).unwrap();
        assert_eq!(profile.newest(), Some(SLOT + 2));
        let values = newest_values(&profile, SLOT + 4, 5);
        assert!(values[0].is_nan() && values[2].is_nan() && values[4].is_nan(), "{values:?}");
        assert_eq!((values[1], values[3]), (1.0, 3.0));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), FILE_BYTES as u64);
    }

    #[test]
    fn the_ring_forgets_what_is_older_than_it_is_long() {
        let dir = tempfile::tempdir().unwrap();
        let mut profile = Profile::open(&dir.path().join("db1")).unwrap();
        for slot in 0..SLOTS as i64 + 10 {
            profile.put(SLOT + slot, [slot as f32, 0.0]).unwrap();
        }
        let all: Vec<f32> =
            profile.before(SLOT + SLOTS as i64 + 10).map(|(_, pair)| pair[0]).collect();
        assert_eq!((all[0], all[SLOTS - 1]), (10.0, SLOTS as f32 + 9.0));
        // After a gap that is longer than the ring nothing of it is left.
        profile.put(SLOT + 3 * SLOTS as i64, [7.0, 0.0]).unwrap();
        let seen = profile.before(SLOT + 3 * SLOTS as i64 + 1);
        assert_eq!(seen.filter(|(_, pair)| pair[0].is_finite()).count(), 1);
    }

    #[test]
    fn a_clock_that_was_far_ahead_is_got_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut profile = Profile::open(&dir.path().join("db1")).unwrap();
        profile.put(SLOT + 1000, [1.0, 1.0]).unwrap();
        profile.put(SLOT + 990, [2.0, 2.0]).unwrap();
        assert_eq!(profile.newest(), Some(SLOT + 1000));
        profile.put(SLOT, [3.0, 3.0]).unwrap();
        assert_eq!(profile.newest(), Some(SLOT));
        assert_eq!(profile.before(SLOT + 1001).filter(|(_, pair)| pair[0] == 1.0).count(), 0);
        assert_eq!(newest_values(&profile, SLOT + 1, 1), [3.0]);
    }

    #[test]
    fn what_is_no_profile_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db1");
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(Profile::open(&path).unwrap().newest(), None);
        std::fs::write(&path, vec![0xff; FILE_BYTES]).unwrap();
        let mut profile = Profile::open(&path).unwrap();
        assert_eq!(profile.newest(), None);
        profile.put(SLOT, [5.0, 5.0]).unwrap();
        assert_eq!(newest_values(&Profile::open(&path).unwrap(), SLOT + 1, 1), [5.0]);
    }
}
