//! Many chunks of a disk as one message, compressed together.
//!
//! Invariant: decoding hashes every chunk; a bundle with one wrong byte yields nothing.
//!
//! ```text
//! version u8 | disk u16 | count varint
//! | count offsets (varint, zigzag difference to the end of the part before)
//! | count lengths (varint) << 1 | zero? | ids of the parts that are not zero (32 bytes)
//! | data of these parts, one after the other, as one `Packed`
//! ```

use bytes::Bytes;

use crate::{
    chunk::{HashMismatch, VerifiedChunk, verify},
    chunker::MAX_CHUNK_BYTES,
    compress::{Compressor, Level, MAX_UNPACKED_BYTES, Packed, UnpackError, decompress},
    cursor::{Cursor, DecodeError, put_difference, put_varint},
    id::ChunkId,
};

/// Parts in one bundle.
pub const MAX_BUNDLE_PARTS: usize = 4096;
/// Data in one bundle before compression, in bytes.
pub const MAX_BUNDLE_BYTES: usize = 16 << 20;

const VERSION: u8 = 1;
const _: () = assert!(MAX_BUNDLE_BYTES <= MAX_UNPACKED_BYTES);

/// What a stretch of a disk is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundlePart {
    /// The bytes of a chunk.
    Chunk {
        /// First byte on the disk.
        offset: u64,
        /// Its content, 1 to [`MAX_CHUNK_BYTES`] bytes.
        chunk: VerifiedChunk,
    },
    /// Zeros, as a hole where the image can have one.
    Zero {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes, never 0.
        len: u64,
    },
}

impl BundlePart {
    /// The bytes of the disk that it covers.
    pub fn range(&self) -> std::ops::Range<u64> {
        let (offset, len) = self.place();
        offset..offset.saturating_add(len)
    }

    fn place(&self) -> (u64, u64) {
        match self {
            Self::Chunk { offset, chunk } => (*offset, chunk.data().len() as u64),
            Self::Zero { offset, len } => (*offset, *len),
        }
    }
}

/// Parts of one disk, in the order in which they are to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkBundle {
    /// The disk, by its place in the VM's description.
    pub disk: u16,
    /// The parts.
    pub parts: Vec<BundlePart>,
}

/// A bundle that must not be written to a disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// It is not what [`ChunkBundle::encode`] writes.
    #[error("chunk bundle: {0}")]
    Malformed(#[from] DecodeError),
    /// Its data cannot be unpacked.
    #[error("chunk bundle: {0}")]
    Unpack(#[from] UnpackError),
    /// A chunk is not what its id says.
    #[error("chunk bundle, disk byte {offset}: {mismatch}")]
    Hash {
        /// Where it was to be written.
        offset: u64,
        /// How it differs.
        mismatch: HashMismatch,
    },
}

impl ChunkBundle {
    /// The serialized form.
    ///
    /// # Panics
    /// If there are more than [`MAX_BUNDLE_PARTS`] or [`MAX_BUNDLE_BYTES`], or a part that is
    /// empty, too long for a chunk, or beyond what an offset can name.
    pub fn encode(&self, compressor: &mut Compressor, level: Level) -> Bytes {
        assert!(self.parts.len() <= MAX_BUNDLE_PARTS, "bundles are made of so many parts");
        let mut offsets = Vec::new();
        let mut lens = Vec::new();
        let mut ids = Vec::new();
        let mut data = Vec::new();
        let mut end = 0;
        for part in &self.parts {
            let (offset, len) = part.place();
            put_difference(&mut offsets, offset, end);
            end = offset.checked_add(len).expect("a disk ends before offsets do");
            let limit = match part {
                BundlePart::Chunk { .. } => u64::from(MAX_CHUNK_BYTES),
                BundlePart::Zero { .. } => u64::MAX >> 1,
            };
            assert!((1..=limit).contains(&len), "the chunker makes no such part");
            put_varint(&mut lens, len << 1 | u64::from(matches!(part, BundlePart::Zero { .. })));
            if let BundlePart::Chunk { chunk, .. } = part {
                ids.extend_from_slice(chunk.id().as_bytes());
                data.extend_from_slice(chunk.data());
            }
        }
        assert!(data.len() <= MAX_BUNDLE_BYTES, "bundles are made of so many bytes");
        let packed = compressor.compress(level, data.into());
        let mut out =
            Vec::with_capacity(16 + offsets.len() + lens.len() + ids.len() + packed.packed_len());
        out.push(VERSION);
        out.extend_from_slice(&self.disk.to_le_bytes());
        put_varint(&mut out, self.parts.len() as u64);
        out.extend_from_slice(&offsets);
        out.extend_from_slice(&lens);
        out.extend_from_slice(&ids);
        packed.encode_into(&mut out);
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote, with at most `max_bytes` of data (and never more
    /// than [`MAX_BUNDLE_BYTES`]), and hashes every chunk.
    pub fn decode(bytes: &Bytes, max_bytes: usize) -> Result<Self, BundleError> {
        let mut cursor = Cursor::new(bytes);
        if cursor.u8("version")? != VERSION {
            return Err(DecodeError::Invalid { what: "version" }.into());
        }
        let disk = cursor.u16("disk")?;
        let count = cursor.count(MAX_BUNDLE_PARTS, "parts")?;
        let mut differences = cursor;
        for _ in 0..count {
            cursor.varint("offset")?;
        }
        let mut lens = cursor;
        let mut chunk_bytes = 0_u64;
        let mut chunks = 0;
        for _ in 0..count {
            let (len, zero) = take_len(&mut cursor)?;
            if !zero {
                // No overflow: at most so many parts of at most a chunk's length.
                chunk_bytes += len;
                chunks += 1;
            }
        }
        let mut ids = Cursor::new(cursor.take(chunks * ChunkId::BYTES, "ids")?);
        let packed = Packed::decode(&bytes.slice_ref(cursor.rest()))?;
        if packed.unpacked_len() as u64 != chunk_bytes {
            return Err(DecodeError::Invalid { what: "length of the data" }.into());
        }
        let mut data = decompress(&packed, max_bytes.min(MAX_BUNDLE_BYTES))?;
        let mut parts = Vec::with_capacity(count);
        let mut end = 0_u64;
        for _ in 0..count {
            let offset = differences.difference(end, "offset")?;
            let (len, zero) = take_len(&mut lens)?;
            end = offset.checked_add(len).ok_or(DecodeError::Invalid { what: "offset" })?;
            if zero {
                parts.push(BundlePart::Zero { offset, len });
                continue;
            }
            let id = ChunkId::from_bytes(ids.array("id")?);
            let chunk = verify(id, data.split_to(len as usize))
                .map_err(|mismatch| BundleError::Hash { offset, mismatch })?;
            parts.push(BundlePart::Chunk { offset, chunk });
        }
        Ok(Self { disk, parts })
    }
}

fn take_len(cursor: &mut Cursor<'_>) -> Result<(u64, bool), DecodeError> {
    let coded = cursor.varint("length")?;
    let (len, zero) = (coded >> 1, coded & 1 == 1);
    if len == 0 {
        return Err(DecodeError::Invalid { what: "length" });
    }
    let limit = u64::from(MAX_CHUNK_BYTES);
    if !zero && len > limit {
        return Err(DecodeError::TooLarge { what: "length", found: len, limit });
    }
    Ok((len, zero))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::RawChunk;

    fn chunk(offset: u64, data: &'static [u8]) -> BundlePart {
        BundlePart::Chunk { offset, chunk: RawChunk::new(Bytes::from_static(data)).hash() }
    }

    fn encode(parts: Vec<BundlePart>) -> Bytes {
        ChunkBundle { disk: 3, parts }.encode(&mut Compressor::new(), Level::Zstd(1))
    }

    #[test]
    fn the_bytes_of_a_bundle_are_fixed() {
        let bytes = encode(vec![chunk(10, b"abc"), BundlePart::Zero { offset: 4096, len: 4096 }]);
        let mut expected = vec![1, 3, 0, 2, 20, 0xe6, 0x3f, 6, 0x81, 0x40];
        expected.extend_from_slice(ChunkId::of(b"abc").as_bytes());
        expected.extend_from_slice(&[0, 3]);
        expected.extend_from_slice(b"abc");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn one_wrong_byte_yields_nothing() {
        let mut bytes = encode(vec![chunk(0, b"abc"), chunk(64, b"def")]).to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let error = ChunkBundle::decode(&bytes.into(), 1 << 20).unwrap_err();
        assert!(matches!(error, BundleError::Hash { offset: 64, .. }), "{error}");
    }

    #[test]
    fn more_data_than_allowed_is_refused() {
        let bytes = encode(vec![chunk(0, &[7; 100_000])]);
        assert!(ChunkBundle::decode(&bytes, 100_000).is_ok());
        let error = ChunkBundle::decode(&bytes, 99_999).unwrap_err();
        assert!(matches!(error, BundleError::Unpack(UnpackError::TooLarge { .. })), "{error}");
    }
}
