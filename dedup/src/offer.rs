//! Have and want, in bulk: the source names pieces of a disk, then the blocks of those that the target
//! lacks, and the target answers each time with one bit for each; of what is only similar here it names the
//! grains.
//!
//! Invariant: a decoded [`Offer`] lists pieces in ascending order without overlap, of whole blocks but
//! for the last; no list is longer than a parcel has blocks, and an [`Answer`] is only read as one to
//! so many questions as were asked.
//!
//! ```text
//! Offer:     version u8 | disk u16 | count varint
//!            | count gaps (varint, blocks between the end of the last piece and this one)
//!            | count lengths (varint, blocks << 1, or bytes << 1 | 1 for a disk's end)
//!            | count ids (32 bytes)
//! BlockList: version u8 | offer varint | count of blocks varint | ids (8 bytes)
//!            | samples: bytes between the begin of the last one and this one (varint), id (5 bytes)
//! Answer:    form u8
//!            | form 0: ceil(count / 8) bytes, lowest bit first, padding 0
//!            | form 1: run lengths (varint), beginning with unwanted, alternating, adding up to count
//! Bases:     for each: pieces between the last one and this one (varint), count varint, names (u16)
//! ```

use bytes::Bytes;

use crate::{
    blocks::{BLOCK_BYTES, MAX_PIECE_BYTES, PARCEL_BLOCKS, PARCEL_BYTES, ShortId},
    cursor::{Cursor, DecodeError, put_varint},
    grains::{GrainId, GrainName},
    id::ChunkId,
    patch::MAX_BASE_GRAINS,
    recipe::RecipeEntry,
};

/// Pieces in one offer, and blocks in one list: those of one parcel.
pub const MAX_OFFER_ENTRIES: usize = PARCEL_BLOCKS;
/// Samples of grains in one list: noise has a third of it.
pub const MAX_SAMPLES: usize = PARCEL_BLOCKS;
/// Names of grains in one answer, in all: two bytes each on a control stream.
pub const MAX_NAMES: usize = 1 << 18;

const VERSION: u8 = 2;
const LIST_VERSION: u8 = 3;
const FORM_BITS: u8 = 0;
const FORM_RUNS: u8 = 1;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Pieces that the source has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The disk, by its place in the VM's description.
    pub disk: u16,
    /// The pieces, ascending, without overlap.
    pub entries: Vec<RecipeEntry>,
}

impl Offer {
    /// The serialized form.
    ///
    /// # Panics
    /// If there are more than [`MAX_OFFER_ENTRIES`], they are not ascending, or do not begin with
    /// blocks.
    pub fn encode(&self) -> Bytes {
        assert!(self.entries.len() <= MAX_OFFER_ENTRIES, "a parcel has so many blocks");
        let mut out = Vec::with_capacity(8 + self.entries.len() * (ChunkId::BYTES + 3));
        out.push(VERSION);
        out.extend_from_slice(&self.disk.to_le_bytes());
        put_varint(&mut out, self.entries.len() as u64);
        let mut end = 0;
        for entry in &self.entries {
            let gap = entry.offset.checked_sub(end).expect("pieces are ascending");
            assert!(
                gap.is_multiple_of(BLOCK),
                "pieces begin with blocks, only the last ends in one"
            );
            put_varint(&mut out, gap / BLOCK);
            end = entry.offset + u64::from(entry.len);
        }
        for entry in &self.entries {
            let len = u64::from(entry.len);
            let whole = len.is_multiple_of(BLOCK);
            put_varint(&mut out, if whole { (len / BLOCK) << 1 } else { len << 1 | 1 });
        }
        self.entries.iter().for_each(|entry| out.extend_from_slice(entry.id.as_bytes()));
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::of_version(bytes, VERSION)?;
        let disk = cursor.u16("disk")?;
        let count = cursor.count(MAX_OFFER_ENTRIES, "pieces")?;
        // Every entry takes at least 34 bytes: a short input cannot ask for a long list.
        if count > bytes.len() / (ChunkId::BYTES + 2) {
            return Err(DecodeError::Truncated { what: "offered pieces" });
        }
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let offset = cursor.bounded(u64::MAX / BLOCK, "gap")? * BLOCK;
            entries.push(RecipeEntry { offset, len: 0, id: ChunkId::from_bytes([0; 32]) });
        }
        let mut end = 0_u64;
        for entry in &mut entries {
            let coded = cursor.varint("piece length")?;
            let (len, whole) = (coded >> 1, coded & 1 == 0);
            let len = if whole { len.saturating_mul(BLOCK) } else { len };
            let bad = || DecodeError::Invalid { what: "piece length" };
            if len > u64::from(MAX_PIECE_BYTES) || whole != len.is_multiple_of(BLOCK) {
                return Err(bad());
            }
            // Behind a disk's end there is nothing.
            if !end.is_multiple_of(BLOCK) {
                return Err(DecodeError::Invalid { what: "gap" });
            }
            entry.len = len as u32;
            entry.offset =
                end.checked_add(entry.offset).ok_or(DecodeError::Invalid { what: "gap" })?;
            end = entry.range().ok_or_else(bad)?.end;
        }
        for entry in &mut entries {
            entry.id = ChunkId::from_bytes(cursor.array("id")?);
        }
        cursor.finish()?;
        Ok(Self { disk, entries })
    }
}

/// The blocks of the wanted pieces of an offer, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockList {
    /// The number of the item that was the offer.
    pub offer: u64,
    /// The blocks' short ids.
    pub blocks: Vec<ShortId>,
    /// Samples of the pieces' grains, ascending: the first byte, among those of all wanted pieces one behind
    /// the other, and the id.
    pub samples: Vec<(u64, GrainId)>,
}

impl BlockList {
    /// The serialized form.
    ///
    /// # Panics
    /// If there are more than [`MAX_OFFER_ENTRIES`] or [`MAX_SAMPLES`], or samples are not ascending.
    pub fn encode(&self) -> Bytes {
        assert!(self.blocks.len() <= MAX_OFFER_ENTRIES, "a parcel has so many blocks");
        assert!(self.samples.len() <= MAX_SAMPLES, "a parcel has so many samples");
        let samples_len = self.samples.len() * (GrainId::BYTES + 3);
        let mut out = Vec::with_capacity(16 + self.blocks.len() * ShortId::BYTES + samples_len);
        out.push(LIST_VERSION);
        put_varint(&mut out, self.offer);
        put_varint(&mut out, self.blocks.len() as u64);
        self.blocks.iter().for_each(|block| out.extend_from_slice(block.as_bytes()));
        let mut last = 0;
        for (place, id) in &self.samples {
            put_varint(&mut out, place.checked_sub(last).expect("samples are ascending"));
            out.extend_from_slice(id.as_bytes());
            last = *place;
        }
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::of_version(bytes, LIST_VERSION)?;
        let offer = cursor.varint("offer")?;
        let count = cursor.count(MAX_OFFER_ENTRIES, "blocks")?;
        let (ids, _) = cursor.take(count * ShortId::BYTES, "blocks")?.as_chunks();
        let blocks = ids.iter().map(|id| ShortId::from_bytes(*id)).collect();
        let mut samples = Vec::new();
        let mut last = 0;
        while !cursor.is_empty() {
            if samples.len() == MAX_SAMPLES {
                return Err(DecodeError::Invalid { what: "count of samples" });
            }
            // No overflow: so many samples of at most so many bytes.
            last += cursor.bounded(PARCEL_BYTES, "sample")?;
            samples.push((last, GrainId::from_bytes(cursor.array("sample")?)));
        }
        Ok(Self { offer, blocks, samples })
    }
}

/// What seems to be similar to wanted pieces of a [`BlockList`], where something is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bases(pub Vec<(usize, Vec<GrainName>)>);

impl Bases {
    /// The serialized form: each piece's number among the wanted ones, ascending, and the names of the
    /// grains of its base, at least one.
    ///
    /// # Panics
    /// If there are more than [`MAX_NAMES`] in all or [`MAX_BASE_GRAINS`] of one, or pieces are not
    /// ascending.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.0.iter().map(|(_, names)| names.len()).sum::<usize>() <= MAX_NAMES);
        let mut out = Vec::new();
        let mut next = 0;
        for (piece, names) in &self.0 {
            assert!((1..=MAX_BASE_GRAINS).contains(&names.len()), "a base has so many grains");
            put_varint(&mut out, piece.checked_sub(next).expect("pieces are ascending") as u64);
            put_varint(&mut out, names.len() as u64);
            names.iter().for_each(|name| out.extend_from_slice(&name.to_le_bytes()));
            next = piece + 1;
        }
        out
    }

    /// Reads what [`encode`](Self::encode) wrote, of `pieces` pieces.
    pub fn decode(bytes: &[u8], pieces: usize) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let mut bases = Vec::new();
        let (mut next, mut all) = (0, 0);
        while !cursor.is_empty() {
            let piece = next + cursor.count(pieces, "piece")?;
            let count = cursor.count(MAX_BASE_GRAINS.min(MAX_NAMES - all), "names")?;
            if piece >= pieces || count == 0 {
                return Err(DecodeError::Invalid { what: "base" });
            }
            let (names, _) = cursor.take(count * size_of::<GrainName>(), "names")?.as_chunks();
            bases.push((piece, names.iter().map(|name| u16::from_le_bytes(*name)).collect()));
            (next, all) = (piece + 1, all + count);
        }
        Ok(Self(bases))
    }
}

/// Which of the things asked about are wanted, one for each, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer(pub Vec<bool>);

impl Answer {
    /// The serialized form: runs or bits, whichever is shorter.
    pub fn encode(&self) -> Vec<u8> {
        let wanted = &self.0;
        let mut runs = vec![FORM_RUNS];
        // The first run is of unwanted entries, of none if need be.
        if wanted.first() == Some(&true) {
            put_varint(&mut runs, 0);
        }
        for run in wanted.chunk_by(|one, next| one == next) {
            put_varint(&mut runs, run.len() as u64);
        }
        if runs.len() <= wanted.len().div_ceil(8) {
            return runs;
        }
        let mut bits = vec![FORM_BITS];
        bits.extend(
            wanted.chunks(8).map(|bits| {
                bits.iter().rev().fold(0, |byte, wanted| byte << 1 | u8::from(*wanted))
            }),
        );
        bits
    }

    /// Reads what [`encode`](Self::encode) wrote, as an answer to `count` questions.
    pub fn decode(bytes: &[u8], count: usize) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let mut wanted = Vec::with_capacity(count);
        match cursor.u8("form")? {
            FORM_BITS => {
                let bits = cursor.take(count.div_ceil(8), "wanted bits")?;
                wanted.extend((0..count).map(|place| bits[place / 8] >> (place % 8) & 1 == 1));
                let used = count % 8;
                if used > 0 && bits.last().is_some_and(|last| last >> used != 0) {
                    return Err(DecodeError::Invalid { what: "padding" });
                }
            }
            FORM_RUNS => {
                let mut is_wanted = false;
                while wanted.len() < count {
                    let run = cursor.count(count - wanted.len(), "run")?;
                    if run == 0 && (is_wanted || !wanted.is_empty()) {
                        return Err(DecodeError::Invalid { what: "run" });
                    }
                    wanted.resize(wanted.len() + run, is_wanted);
                    is_wanted = !is_wanted;
                }
            }
            _ => return Err(DecodeError::Invalid { what: "form" }),
        }
        cursor.finish()?;
        Ok(Self(wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(lens: &[u32]) -> Offer {
        let mut offset = 4096;
        let entries = lens
            .iter()
            .map(|len| {
                let entry = RecipeEntry { offset, len: *len, id: ChunkId::of(&len.to_le_bytes()) };
                offset += u64::from(*len);
                entry
            })
            .collect();
        Offer { disk: 2, entries }
    }

    #[test]
    fn the_bytes_of_an_offer_are_fixed() {
        let offer = offer(&[8192, 5]);
        let mut expected = vec![2, 2, 0, 2, 1, 0, 4, 11];
        expected.extend_from_slice(offer.entries[0].id.as_bytes());
        expected.extend_from_slice(offer.entries[1].id.as_bytes());
        assert_eq!(offer.encode(), expected);
    }

    #[test]
    fn the_bytes_of_a_block_list_are_fixed() {
        let blocks = vec![ShortId::from_bytes([7; 8])];
        let samples = [8, 9].map(|n| (u64::from(n) * 10, GrainId::from_bytes([n; 5]))).to_vec();
        let list = BlockList { offer: 300, blocks, samples };
        let bytes =
            [3, 0xac, 0x02, 1, 7, 7, 7, 7, 7, 7, 7, 7, 80, 8, 8, 8, 8, 8, 10, 9, 9, 9, 9, 9];
        assert_eq!(list.encode()[..], bytes);
        assert_eq!(BlockList::decode(&bytes), Ok(list));
        assert!(BlockList::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(BlockList::decode(&bytes[..11]).is_err());
    }

    #[test]
    fn the_bytes_of_bases_are_fixed() {
        let bases = Bases(vec![(1, vec![0x0102]), (3, vec![4, 5])]);
        let bytes = [1, 1, 2, 1, 1, 2, 4, 0, 5, 0];
        assert_eq!(bases.encode(), bytes);
        assert_eq!(Bases::decode(&bytes, 4), Ok(bases));
        assert_eq!(Bases::decode(&bytes, 3), Err(DecodeError::Invalid { what: "base" }));
        assert_eq!(Bases::decode(&[], 0), Ok(Bases::default()));
        assert!(Bases::decode(&[0, 0], 1).is_err());
    }

    #[test]
    fn the_bytes_of_an_answer_are_fixed() {
        assert_eq!(Answer(vec![true, false, true]).encode(), [0, 0b101]);
        assert_eq!(Answer(vec![true; 1000]).encode(), [1, 0, 0xe8, 0x07]);
        assert_eq!(Answer(Vec::new()).encode(), [0]);
        assert!(Answer::decode(&[1, 0, 0xe8, 0x07], 999).is_err());
        assert!(Answer::decode(&[1, 0, 0xe8, 0x07], 1001).is_err());
    }

    #[test]
    fn two_spellings_of_one_answer_are_not_both_accepted() {
        assert_eq!(Answer::decode(&[0, 0b1000], 3), Err(DecodeError::Invalid { what: "padding" }));
        assert_eq!(Answer::decode(&[1, 1, 0, 2], 3), Err(DecodeError::Invalid { what: "run" }));
        assert!(matches!(Answer::decode(&[1, 1, 3], 3), Err(DecodeError::TooLarge { .. })));
    }

    #[test]
    fn a_short_offer_cannot_ask_for_a_long_list() {
        let mut bytes = vec![2, 0, 0];
        put_varint(&mut bytes, MAX_OFFER_ENTRIES as u64);
        assert!(matches!(Offer::decode(&bytes), Err(DecodeError::Truncated { .. })));
    }

    #[test]
    fn an_offer_beyond_the_end_of_numbers_or_of_its_disk_is_refused() {
        let last = RecipeEntry { offset: u64::MAX - 4095, len: 5, id: ChunkId::of(b"") };
        let offer = Offer { disk: 0, entries: vec![last] };
        assert_eq!(Offer::decode(&offer.encode()).unwrap(), offer);
        let mut bytes = offer.encode().to_vec();
        let len_at = bytes.len() - 33;
        bytes[len_at] = 2;
        assert_eq!(Offer::decode(&bytes), Err(DecodeError::Invalid { what: "piece length" }));
        let mut behind = self::offer(&[8192, 4096]).encode().to_vec();
        behind[6] = 11;
        assert_eq!(Offer::decode(&behind), Err(DecodeError::Invalid { what: "gap" }));
    }
}
