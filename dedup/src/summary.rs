//! Parcels of a disk in a hash each, or in one for many: what is the same at the same place of both ends
//! costs 32 bytes for 16 MiB, or for gigabytes.
//!
//! Invariant: two parcels have one summary if, and only if, they have the same pieces at the same
//! places and zeros everywhere else; so have as many parcels as one. A decoded [`Summaries`] names no more parcels than
//! [`MAX_SUMMARIES`].
//!
//! ```text
//! version u8 | disk u16 | first parcel varint | count of runs varint
//! | runs (varint, parcels << 1 | all zeros?), alternating | hashes of those that are not (32 bytes)
//! ```

use std::ops::Range;

use bytes::Bytes;

use crate::{
    blocks::PARCEL_BYTES,
    cursor::{Cursor, DecodeError, put_varint},
    recipe::RecipeEntry,
};

/// Parcels in one message: 256 GiB.
pub const MAX_SUMMARIES: usize = 16_384;

const VERSION: u8 = 1;

/// What a parcel holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Summary {
    /// Nothing but zeros.
    Zeros,
    /// Pieces whose places, lengths and ids have this hash.
    Pieces([u8; blake3::OUT_LEN]),
}

impl Summary {
    /// Of the parcel at these bytes, which holds these pieces, ascending, and otherwise zeros.
    pub fn of(parcel: &Range<u64>, pieces: impl IntoIterator<Item = RecipeEntry>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parcel.start.to_le_bytes());
        hasher.update(&parcel.end.to_le_bytes());
        let mut empty = true;
        for piece in pieces {
            empty = false;
            hasher.update(&piece.offset.to_le_bytes());
            hasher.update(&piece.len.to_le_bytes());
            hasher.update(piece.id.as_bytes());
        }
        if empty { Self::Zeros } else { Self::Pieces(*hasher.finalize().as_bytes()) }
    }

    /// Of parcels side by side, as one.
    pub fn of_many(parcels: &[Self]) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut empty = true;
        for parcel in parcels {
            match parcel {
                Self::Zeros => hasher.update(&[0]),
                Self::Pieces(hash) => {
                    empty = false;
                    hasher.update(&[1]).update(hash)
                }
            };
        }
        if empty { Self::Zeros } else { Self::Pieces(*hasher.finalize().as_bytes()) }
    }
}

/// The bytes of a parcel on a disk of `disk_bytes`; `None` if the disk does not reach so far.
pub fn parcel_range(parcel: u64, disk_bytes: u64) -> Option<Range<u64>> {
    let start = parcel.checked_mul(PARCEL_BYTES)?;
    let end = start.saturating_add(PARCEL_BYTES).min(disk_bytes);
    (start < end).then_some(start..end)
}

/// Summaries of parcels side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summaries {
    /// The disk, by its place in the VM's description.
    pub disk: u16,
    /// The first parcel.
    pub first: u64,
    /// That parcel and those behind it.
    pub parcels: Vec<Summary>,
}

impl Summaries {
    /// The serialized form.
    ///
    /// # Panics
    /// If there are more than [`MAX_SUMMARIES`].
    pub fn encode(&self) -> Bytes {
        assert!(self.parcels.len() <= MAX_SUMMARIES, "batches are made of so many parcels");
        let mut out = Vec::new();
        out.push(VERSION);
        out.extend_from_slice(&self.disk.to_le_bytes());
        put_varint(&mut out, self.first);
        let alike =
            |one: &Summary, next: &Summary| (*one == Summary::Zeros) == (*next == Summary::Zeros);
        let runs: Vec<&[Summary]> = self.parcels.chunk_by(alike).collect();
        put_varint(&mut out, runs.len() as u64);
        for run in runs {
            put_varint(&mut out, (run.len() as u64) << 1 | u64::from(run[0] == Summary::Zeros));
        }
        for summary in &self.parcels {
            if let Summary::Pieces(hash) = summary {
                out.extend_from_slice(hash);
            }
        }
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::of_version(bytes, VERSION)?;
        let disk = cursor.u16("disk")?;
        let first = cursor.varint("first parcel")?;
        let runs = cursor.count(MAX_SUMMARIES, "runs")?;
        let mut parcels = Vec::new();
        let mut last = None;
        for _ in 0..runs {
            let coded = cursor.bounded((MAX_SUMMARIES as u64) << 1 | 1, "run")?;
            let (len, zeros) = ((coded >> 1) as usize, coded & 1 == 1);
            if len == 0 || len > MAX_SUMMARIES - parcels.len() || last == Some(zeros) {
                return Err(DecodeError::Invalid { what: "run" });
            }
            last = Some(zeros);
            let summary =
                if zeros { Summary::Zeros } else { Summary::Pieces([0; blake3::OUT_LEN]) };
            parcels.resize(parcels.len() + len, summary);
        }
        for summary in &mut parcels {
            if let Summary::Pieces(hash) = summary {
                *hash = cursor.array("hash")?;
            }
        }
        cursor.finish()?;
        Ok(Self { disk, first, parcels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;

    fn piece(offset: u64, len: u32, n: u8) -> RecipeEntry {
        RecipeEntry { offset, len, id: ChunkId::of(&[n]) }
    }

    #[test]
    fn a_summary_changes_with_all_that_it_stands_for() {
        let parcel = 0..PARCEL_BYTES;
        let some = [piece(0, 4096, 1), piece(8192, 4096, 2)];
        let of = |pieces: &[RecipeEntry]| Summary::of(&parcel, pieces.iter().copied());
        assert_eq!(of(&some), of(&some));
        for other in [
            &some[..1],
            &[piece(0, 4096, 1), piece(8192, 4096, 3)],
            &[piece(0, 4096, 1), piece(12288, 4096, 2)],
            &[piece(0, 8192, 1), piece(8192, 4096, 2)],
        ] {
            assert_ne!(of(&some), of(other));
        }
        assert_eq!(of(&[]), Summary::Zeros);
        assert_ne!(of(&some), Summary::of(&(0..PARCEL_BYTES / 2), some));
    }

    #[test]
    fn many_have_one_summary_if_each_has_the_same() {
        let (one, other) = (Summary::Pieces([1; 32]), Summary::Pieces([2; 32]));
        let all = [Summary::Zeros, one, other];
        assert_eq!(Summary::of_many(&[Summary::Zeros; 9]), Summary::Zeros);
        assert_eq!(Summary::of_many(&all), Summary::of_many(&all));
        for changed in [
            &[one, Summary::Zeros, other][..],
            &[Summary::Zeros, other, one],
            &[Summary::Zeros, one, one],
            &[Summary::Zeros, one],
            &[Summary::Zeros, one, other, Summary::Zeros],
        ] {
            assert_ne!(Summary::of_many(&all), Summary::of_many(changed));
        }
    }

    #[test]
    fn parcels_end_with_their_disk() {
        assert_eq!(parcel_range(0, PARCEL_BYTES + 1), Some(0..PARCEL_BYTES));
        assert_eq!(parcel_range(1, PARCEL_BYTES + 1), Some(PARCEL_BYTES..PARCEL_BYTES + 1));
        assert_eq!(parcel_range(1, PARCEL_BYTES), None);
        assert_eq!(parcel_range(u64::MAX, u64::MAX), None);
    }

    /// A disk of 1 TiB with 8 GiB of data.
    #[test]
    fn parcels_of_zeros_cost_next_to_nothing() {
        let mut bytes = 0;
        for batch in 0..4 {
            let parcels = (0..MAX_SUMMARIES as u64)
                .map(|n| match n % 128 {
                    0 => Summary::Pieces([n as u8; 32]),
                    _ => Summary::Zeros,
                })
                .collect();
            let first = batch * MAX_SUMMARIES as u64;
            bytes += Summaries { disk: 0, first, parcels }.encode().len();
        }
        assert!(bytes < 20 << 10, "{bytes}");
    }
}
