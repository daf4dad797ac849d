//! A page as the difference to the version of it that the target already has.
//!
//! The source does not keep that version: it keeps 16 hashes of 64 bits, one for each 256-byte
//! sub-block ([`SubHashes`], 128 bytes or 3.1 % of the page), and sends the sub-blocks whose hash
//! changed. Two versions of a sub-block may share a hash, by chance or because a guest wants it:
//! the page that the target then builds is wrong, and the hash over the batch
//! ([`pagebatch`](crate::pagebatch)) says so. A difference is thus a guess that costs a resend when
//! it is wrong; after a mismatch the page must go in full.
//!
//! Invariant: a [`Delta`] holds exactly the sub-blocks that its bitmap names, so applying it cannot
//! fail.
//!
//! Serialized: the bitmap as a little-endian `u16` (bit `i` for bytes `256 * i ..`), then the
//! changed sub-blocks in ascending order.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    cursor::{Cursor, DecodeError},
    pages::PAGE_BYTES,
};

/// Bytes in a sub-block.
pub const SUB_BLOCK_BYTES: usize = 256;
/// Sub-blocks in a page.
pub const SUB_BLOCKS: usize = PAGE_BYTES / SUB_BLOCK_BYTES;

/// What the source remembers of a page that it sent: XXH3-64 of each sub-block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubHashes([u64; SUB_BLOCKS]);

impl SubHashes {
    /// The hashes of `page`.
    pub fn of(page: &[u8; PAGE_BYTES]) -> Self {
        let (blocks, _) = page.as_chunks::<SUB_BLOCK_BYTES>();
        Self(std::array::from_fn(|block| xxh3_64(&blocks[block])))
    }

    /// The sub-blocks that differ from `newer`, as a bitmap.
    pub fn changed(&self, newer: &Self) -> u16 {
        let pairs = self.0.iter().zip(&newer.0);
        pairs.enumerate().fold(0, |bits, (block, (old, new))| bits | u16::from(old != new) << block)
    }
}

/// The sub-blocks of a page that changed.
#[derive(Clone, PartialEq, Eq)]
pub struct Delta {
    changed: u16,
    data: Bytes,
}

impl Delta {
    /// A difference from its parts; `data` holds a sub-block for each bit of `changed`.
    pub fn new(changed: u16, data: Bytes) -> Result<Self, DecodeError> {
        let expected = Self::data_bytes(changed);
        if data.len() < expected {
            return Err(DecodeError::Truncated { what: "changed sub-blocks" });
        }
        if data.len() > expected {
            return Err(DecodeError::Trailing { bytes: data.len() - expected });
        }
        Ok(Self { changed, data })
    }

    /// Reads what [`encode_into`](Self::encode_into) wrote; `bytes` holds nothing else.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let changed = cursor.u16("changed sub-blocks")?;
        Self::new(changed, bytes.slice_ref(cursor.rest()))
    }

    /// Appends the serialized form to `out`.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.changed.to_le_bytes());
        out.extend_from_slice(&self.data);
    }

    /// Bytes in the serialized form: 2 if nothing changed, at most 4098.
    pub fn encoded_bytes(&self) -> usize {
        2 + self.data.len()
    }

    /// Which sub-blocks changed: bit `i` for bytes `256 * i ..`.
    pub fn changed(&self) -> u16 {
        self.changed
    }

    /// The changed sub-blocks in ascending order.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Bytes of data that go with a bitmap.
    pub(crate) fn data_bytes(changed: u16) -> usize {
        changed.count_ones() as usize * SUB_BLOCK_BYTES
    }
}

impl std::fmt::Debug for Delta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Delta({:016b})", self.changed)
    }
}

/// What of `page` differs from the version at the target, whose hashes are `base`.
pub fn encode(page: &[u8; PAGE_BYTES], base: &SubHashes) -> Delta {
    let changed = base.changed(&SubHashes::of(page));
    let mut data = Vec::with_capacity(Delta::data_bytes(changed));
    for block in set_bits(changed) {
        data.extend_from_slice(&page[block * SUB_BLOCK_BYTES..][..SUB_BLOCK_BYTES]);
    }
    Delta { changed, data: data.into() }
}

/// Turns the version at the target into the newer one.
pub fn apply(base: &mut [u8; PAGE_BYTES], delta: &Delta) {
    for (block, data) in set_bits(delta.changed).zip(delta.data.chunks_exact(SUB_BLOCK_BYTES)) {
        base[block * SUB_BLOCK_BYTES..][..SUB_BLOCK_BYTES].copy_from_slice(data);
    }
}

fn set_bits(bits: u16) -> impl Iterator<Item = usize> {
    (0..SUB_BLOCKS).filter(move |block| bits >> block & 1 == 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_changed_byte_costs_one_sub_block() {
        let old = [3; PAGE_BYTES];
        let mut new = old;
        new[4095] = 4;
        let delta = encode(&new, &SubHashes::of(&old));
        assert_eq!(delta.changed(), 0x8000);
        assert_eq!(delta.encoded_bytes(), 2 + 256);
        assert_eq!(encode(&old, &SubHashes::of(&old)).encoded_bytes(), 2);
    }

    #[test]
    fn the_serialized_form_is_bitmap_then_sub_blocks() {
        let delta = Delta::new(0b101, Bytes::from(vec![9; 512])).unwrap();
        let mut bytes = Vec::new();
        delta.encode_into(&mut bytes);
        assert_eq!(bytes[..2], [0b101, 0]);
        assert_eq!(bytes[2..], [9; 512]);
    }

    #[test]
    fn a_delta_of_the_wrong_length_is_refused() {
        let short = Delta::decode(&Bytes::from_static(&[1]));
        assert!(matches!(short, Err(DecodeError::Truncated { .. })), "{short:?}");
        let less = Delta::new(1, Bytes::from(vec![0; 255]));
        assert!(matches!(less, Err(DecodeError::Truncated { .. })), "{less:?}");
        let more = Delta::new(1, Bytes::from(vec![0; 257]));
        assert_eq!(more, Err(DecodeError::Trailing { bytes: 1 }));
    }

    proptest! {
        #[test]
        fn applying_a_delta_gives_the_newer_page(
            seed: u8,
            changes in prop::collection::vec((0_usize..PAGE_BYTES, any::<u8>()), 0..40),
        ) {
            let old: [u8; PAGE_BYTES] = std::array::from_fn(|at| (at as u8).wrapping_mul(seed));
            let mut new = old;
            for (at, byte) in &changes {
                new[*at] = *byte;
            }
            let delta = encode(&new, &SubHashes::of(&old));
            let mut bytes = Vec::new();
            delta.encode_into(&mut bytes);
            prop_assert_eq!(bytes.len(), delta.encoded_bytes());
            let delta = Delta::decode(&bytes.into()).unwrap();
            let mut rebuilt = old;
            apply(&mut rebuilt, &delta);
            prop_assert_eq!(rebuilt, new);
        }

        #[test]
        fn garbage_is_a_delta_only_in_its_own_spelling(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let bytes = Bytes::from(bytes);
            if let Ok(delta) = Delta::decode(&bytes) {
                let mut again = Vec::new();
                delta.encode_into(&mut again);
                prop_assert_eq!(&bytes[..], &again[..]);
            }
        }
    }
}
