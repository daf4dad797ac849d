//! Have and want, in bulk: the source offers a stretch of a disk's recipe, the target answers with
//! one bit for each chunk.
//!
//! Invariant: a decoded [`Offer`] lists chunks in ascending order without overlap, and a decoded
//! [`Want`] has exactly one bit for each entry of the offer that it answers.
//!
//! ```text
//! Offer: version u8 | disk u16 | first varint | count varint
//!        | count gaps (varint, bytes between the end of the last chunk and this one)
//!        | count lengths (varint) | count ids (32 bytes)
//! Want:  version u8 | disk u16 | first varint | count varint | form u8
//!        | form 0: ceil(count / 8) bytes, lowest bit first, padding 0
//!        | form 1: run lengths (varint), beginning with unwanted, alternating, adding up to count
//! ```

use bytes::Bytes;

use crate::{
    chunker::MAX_CHUNK_BYTES,
    cursor::{Cursor, DecodeError, put_varint},
    id::ChunkId,
    recipe::RecipeEntry,
};

/// Chunks in one offer: about 1 GiB of disk in 600 KiB, few enough to be answered while the next
/// offer is on its way.
pub const MAX_OFFER_ENTRIES: usize = 16_384;

const VERSION: u8 = 1;
const FORM_BITS: u8 = 0;
const FORM_RUNS: u8 = 1;

/// A stretch of a disk's recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The disk, by its place in the VM's description.
    pub disk: u16,
    /// The number of the first entry, counted from the beginning of the disk's recipe.
    pub first: u64,
    /// The chunks, ascending, without overlap.
    pub entries: Vec<RecipeEntry>,
}

impl Offer {
    /// The serialized form.
    ///
    /// # Panics
    /// If there are more than [`MAX_OFFER_ENTRIES`], or they are not ascending.
    pub fn encode(&self) -> Bytes {
        assert!(self.entries.len() <= MAX_OFFER_ENTRIES, "offers are made of so many chunks");
        let mut out = Vec::with_capacity(24 + self.entries.len() * (ChunkId::BYTES + 5));
        put_head(&mut out, self.disk, self.first, self.entries.len());
        let mut end = 0;
        for entry in &self.entries {
            let gap = entry.offset.checked_sub(end).expect("a recipe's entries are ascending");
            put_varint(&mut out, gap);
            end = entry.offset + u64::from(entry.len);
        }
        self.entries.iter().for_each(|entry| put_varint(&mut out, u64::from(entry.len)));
        self.entries.iter().for_each(|entry| out.extend_from_slice(entry.id.as_bytes()));
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let (disk, first, count) = take_head(&mut cursor)?;
        // Every entry takes at least 34 bytes: a short input cannot ask for a long list.
        if count > bytes.len() / (ChunkId::BYTES + 2) {
            return Err(DecodeError::Truncated { what: "offered chunks" });
        }
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let gap = cursor.varint("gap")?;
            entries.push(RecipeEntry { offset: gap, len: 0, id: ChunkId::from_bytes([0; 32]) });
        }
        let mut end = 0_u64;
        for entry in &mut entries {
            entry.len = cursor.count(MAX_CHUNK_BYTES as usize, "chunk length")? as u32;
            entry.offset =
                end.checked_add(entry.offset).ok_or(DecodeError::Invalid { what: "gap" })?;
            end = entry.range().ok_or(DecodeError::Invalid { what: "chunk length" })?.end;
        }
        for entry in &mut entries {
            entry.id = ChunkId::from_bytes(cursor.array("id")?);
        }
        cursor.finish()?;
        Ok(Self { disk, first, entries })
    }
}

/// Which chunks of an offer the target has to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// As in the offer.
    pub disk: u16,
    /// As in the offer.
    pub first: u64,
    wanted: Vec<bool>,
}

impl Want {
    /// The answer to `offer`; `is_wanted` is asked for each entry, in order.
    pub fn answer(offer: &Offer, is_wanted: impl FnMut(&RecipeEntry) -> bool) -> Self {
        let wanted = offer.entries.iter().map(is_wanted).collect();
        Self { disk: offer.disk, first: offer.first, wanted }
    }

    /// Whether it answers this offer, by disk, first entry and count.
    pub fn answers(&self, offer: &Offer) -> bool {
        (self.disk, self.first, self.wanted.len()) == (offer.disk, offer.first, offer.entries.len())
    }

    /// One answer for each entry of the offer, in order.
    pub fn wanted(&self) -> &[bool] {
        &self.wanted
    }

    /// The entries of the offer that are wanted, by their place in it.
    pub fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        self.wanted.iter().enumerate().filter_map(|(place, wanted)| wanted.then_some(place))
    }

    /// The serialized form: runs or bits, whichever is shorter.
    ///
    /// # Panics
    /// If it answers more than [`MAX_OFFER_ENTRIES`].
    pub fn encode(&self) -> Bytes {
        assert!(self.wanted.len() <= MAX_OFFER_ENTRIES, "offers are made of so many chunks");
        let mut out = Vec::new();
        put_head(&mut out, self.disk, self.first, self.wanted.len());
        let mut runs = Vec::new();
        // The first run is of unwanted entries, of none if need be.
        if self.wanted.first() == Some(&true) {
            put_varint(&mut runs, 0);
        }
        for run in self.wanted.chunk_by(|one, next| one == next) {
            put_varint(&mut runs, run.len() as u64);
        }
        if runs.len() < self.wanted.len().div_ceil(8) {
            out.push(FORM_RUNS);
            out.extend_from_slice(&runs);
        } else {
            out.push(FORM_BITS);
            out.extend(self.wanted.chunks(8).map(|bits| {
                bits.iter().rev().fold(0, |byte, wanted| byte << 1 | u8::from(*wanted))
            }));
        }
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let (disk, first, count) = take_head(&mut cursor)?;
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
        Ok(Self { disk, first, wanted })
    }
}

fn put_head(out: &mut Vec<u8>, disk: u16, first: u64, count: usize) {
    out.push(VERSION);
    out.extend_from_slice(&disk.to_le_bytes());
    put_varint(out, first);
    put_varint(out, count as u64);
}

fn take_head(cursor: &mut Cursor<'_>) -> Result<(u16, u64, usize), DecodeError> {
    if cursor.u8("version")? != VERSION {
        return Err(DecodeError::Invalid { what: "version" });
    }
    let disk = cursor.u16("disk")?;
    let first = cursor.varint("first entry")?;
    let count = cursor.count(MAX_OFFER_ENTRIES, "offered chunks")?;
    // Numbers of entries stay numbers.
    first.checked_add(count as u64).ok_or(DecodeError::Invalid { what: "first entry" })?;
    Ok((disk, first, count))
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
        Offer { disk: 2, first: 7, entries }
    }

    #[test]
    fn the_bytes_of_an_offer_are_fixed() {
        let offer = offer(&[300, 5]);
        let mut expected = vec![1, 2, 0, 7, 2, 0x80, 0x20, 0, 0xac, 0x02, 5];
        expected.extend_from_slice(offer.entries[0].id.as_bytes());
        expected.extend_from_slice(offer.entries[1].id.as_bytes());
        assert_eq!(offer.encode(), expected);
    }

    #[test]
    fn the_bytes_of_a_want_are_fixed() {
        let few = Want::answer(&offer(&[1, 2, 3]), |entry| entry.len != 2);
        assert_eq!(few.encode()[..], [1, 2, 0, 7, 3, 0, 0b101]);
        assert_eq!(few.indices().collect::<Vec<_>>(), [0, 2]);
        let many = Want::answer(&offer(&[9; 1000]), |_| true);
        assert_eq!(many.encode()[..], [1, 2, 0, 7, 0xe8, 0x07, 1, 0, 0xe8, 0x07]);
        assert!(many.answers(&offer(&[9; 1000])));
        assert!(!many.answers(&offer(&[9; 999])));
    }

    #[test]
    fn two_spellings_of_one_want_are_not_both_accepted() {
        let padding = [1, 2, 0, 7, 3, 0, 0b1000];
        assert_eq!(Want::decode(&padding), Err(DecodeError::Invalid { what: "padding" }));
        let empty_run = [1, 2, 0, 7, 3, 1, 1, 0, 2];
        assert_eq!(Want::decode(&empty_run), Err(DecodeError::Invalid { what: "run" }));
        let too_long = [1, 2, 0, 7, 3, 1, 1, 3];
        assert!(matches!(Want::decode(&too_long), Err(DecodeError::TooLarge { .. })));
    }

    #[test]
    fn a_short_offer_cannot_ask_for_a_long_list() {
        let mut bytes = vec![1, 0, 0, 0];
        put_varint(&mut bytes, MAX_OFFER_ENTRIES as u64);
        assert!(matches!(Offer::decode(&bytes), Err(DecodeError::Truncated { .. })));
    }

    #[test]
    fn an_offer_beyond_the_end_of_numbers_is_refused() {
        let last = RecipeEntry { offset: u64::MAX - 5, len: 5, id: ChunkId::of(b"") };
        let offer = Offer { disk: 0, first: 0, entries: vec![last] };
        assert_eq!(Offer::decode(&offer.encode()).unwrap(), offer);
        let mut bytes = offer.encode().to_vec();
        let len_at = bytes.len() - 33;
        bytes[len_at] = 6;
        assert_eq!(Offer::decode(&bytes), Err(DecodeError::Invalid { what: "chunk length" }));
    }
}
