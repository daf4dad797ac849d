//! Many pieces of a disk, and runs of blocks of others, as one message, compressed together.
//!
//! Invariant: decoding hashes every piece; a bundle with one wrong byte in one yields nothing. Blocks
//! and patches have no id here: they are checked with the piece that is put together from them.
//!
//! ```text
//! version u8 | disk u16 | count varint
//! | count offsets (varint, zigzag difference to the end of the part before)
//! | count lengths (varint) << 2 | kind (0 piece, 1 blocks, 2 zeros, 3 patch) | ids of the pieces (32 bytes)
//! | data of pieces, blocks and patches, one after the other, as one `Packed`
//! ```

use bytes::Bytes;

use crate::{
    blocks::MAX_PIECE_BYTES,
    chunk::{HashMismatch, VerifiedChunk, verify},
    compress::{Compressor, Level, MAX_UNPACKED_BYTES, Packed, UnpackError, decompress},
    cursor::{Cursor, DecodeError, put_difference, put_varint},
    id::ChunkId,
};

/// Parts in one bundle.
pub const MAX_BUNDLE_PARTS: usize = 4096;
/// Data in one bundle before compression, in bytes.
pub const MAX_BUNDLE_BYTES: usize = 16 << 20;

const VERSION: u8 = 3;
const KIND_PIECE: u64 = 0;
const KIND_BLOCKS: u64 = 1;
const KIND_ZEROS: u64 = 2;
const KIND_PATCH: u64 = 3;
const _: () = assert!(MAX_BUNDLE_BYTES <= MAX_UNPACKED_BYTES);

/// What a stretch of a disk is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BundlePart {
    /// The bytes of a piece.
    Chunk {
        /// First byte on the disk.
        offset: u64,
        /// Its content, 1 to [`MAX_PIECE_BYTES`] bytes.
        chunk: VerifiedChunk,
    },
    /// Blocks side by side of a piece of which the target has the others. Nobody has checked them.
    Blocks {
        /// First byte on the disk.
        offset: u64,
        /// Their content, 1 to [`MAX_PIECE_BYTES`] bytes.
        data: Bytes,
    },
    /// A piece as the difference to what the target named. Nobody has checked it.
    Patch {
        /// First byte of the piece on the disk.
        offset: u64,
        /// Encoded by [`Patch`](crate::patch::Patch), shorter than the piece.
        data: Bytes,
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
    /// The bytes of the disk that it covers; of a patch, as many as it has itself.
    pub fn range(&self) -> std::ops::Range<u64> {
        let (offset, len) = self.place();
        offset..offset.saturating_add(len)
    }

    fn place(&self) -> (u64, u64) {
        match self {
            Self::Chunk { offset, chunk } => (*offset, chunk.data().len() as u64),
            Self::Blocks { offset, data } | Self::Patch { offset, data } => {
                (*offset, data.len() as u64)
            }
            Self::Zero { offset, len } => (*offset, *len),
        }
    }

    /// The bytes that go with it: none for zeros.
    pub fn data(&self) -> &[u8] {
        match self {
            Self::Chunk { chunk, .. } => chunk.data(),
            Self::Blocks { data, .. } | Self::Patch { data, .. } => data,
            Self::Zero { .. } => &[],
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
    /// A piece is not what its id says.
    #[error("chunk bundle, disk byte {offset}: {mismatch}")]
    Hash {
        /// Where it was to be written.
        offset: u64,
        /// How it differs.
        mismatch: HashMismatch,
    },
}

impl ChunkBundle {
    /// The serialized form. Takes the parts, so none is held any longer than until it is copied.
    ///
    /// # Panics
    /// If there are more than [`MAX_BUNDLE_PARTS`] or [`MAX_BUNDLE_BYTES`], or a part that is
    /// empty, too long for a piece, or beyond what an offset can name.
    pub fn encode(self, compressor: &mut Compressor, level: Level) -> Bytes {
        assert!(self.parts.len() <= MAX_BUNDLE_PARTS, "bundles are made of so many parts");
        let mut offsets = Vec::new();
        let mut lens = Vec::new();
        let mut ids = Vec::new();
        let mut data = Vec::new();
        let mut end = 0;
        let count = self.parts.len() as u64;
        for part in self.parts {
            let (offset, len) = part.place();
            put_difference(&mut offsets, offset, end);
            end = offset.checked_add(len).expect("a disk ends before offsets do");
            let (kind, limit) = match &part {
                BundlePart::Chunk { .. } => (KIND_PIECE, u64::from(MAX_PIECE_BYTES)),
                BundlePart::Blocks { .. } => (KIND_BLOCKS, u64::from(MAX_PIECE_BYTES)),
                BundlePart::Patch { .. } => (KIND_PATCH, u64::from(MAX_PIECE_BYTES)),
                BundlePart::Zero { .. } => (KIND_ZEROS, u64::MAX >> 2),
            };
            assert!((1..=limit).contains(&len), "no part is so long");
            put_varint(&mut lens, len << 2 | kind);
            if let BundlePart::Chunk { chunk, .. } = &part {
                ids.extend_from_slice(chunk.id().as_bytes());
            }
            data.extend_from_slice(part.data());
        }
        assert!(data.len() <= MAX_BUNDLE_BYTES, "bundles are made of so many bytes");
        let packed = compressor.compress(level, data.into());
        let mut out =
            Vec::with_capacity(16 + offsets.len() + lens.len() + ids.len() + packed.packed_len());
        out.push(VERSION);
        out.extend_from_slice(&self.disk.to_le_bytes());
        put_varint(&mut out, count);
        out.extend_from_slice(&offsets);
        out.extend_from_slice(&lens);
        out.extend_from_slice(&ids);
        packed.encode_into(&mut out);
        out.into()
    }

    /// Reads what [`encode`](Self::encode) wrote, with at most `max_bytes` of data (and never more
    /// than [`MAX_BUNDLE_BYTES`]), and hashes every piece.
    pub fn decode(bytes: &Bytes, max_bytes: usize) -> Result<Self, BundleError> {
        let mut cursor = Cursor::of_version(bytes, VERSION)?;
        let disk = cursor.u16("disk")?;
        let count = cursor.count(MAX_BUNDLE_PARTS, "parts")?;
        let mut differences = cursor;
        for _ in 0..count {
            cursor.varint("offset")?;
        }
        let mut lens = cursor;
        let mut data_bytes = 0_u64;
        let mut pieces = 0;
        for _ in 0..count {
            let (len, kind) = take_len(&mut cursor)?;
            if kind != KIND_ZEROS {
                // No overflow: at most so many parts of at most a piece's length.
                data_bytes += len;
            }
            pieces += usize::from(kind == KIND_PIECE);
        }
        let mut ids = Cursor::new(cursor.take(pieces * ChunkId::BYTES, "ids")?);
        let packed = Packed::decode(&bytes.slice_ref(cursor.rest()))?;
        if packed.unpacked_len() as u64 != data_bytes {
            return Err(DecodeError::Invalid { what: "length of the data" }.into());
        }
        let mut data = decompress(&packed, max_bytes.min(MAX_BUNDLE_BYTES))?;
        let mut parts = Vec::with_capacity(count);
        let mut end = 0_u64;
        for _ in 0..count {
            let offset = differences.difference(end, "offset")?;
            let (len, kind) = take_len(&mut lens)?;
            end = offset.checked_add(len).ok_or(DecodeError::Invalid { what: "offset" })?;
            parts.push(match kind {
                KIND_ZEROS => BundlePart::Zero { offset, len },
                KIND_PATCH => BundlePart::Patch { offset, data: data.split_to(len as usize) },
                KIND_BLOCKS => BundlePart::Blocks { offset, data: data.split_to(len as usize) },
                _ => {
                    let id = ChunkId::from_bytes(ids.array("id")?);
                    let chunk = verify(id, data.split_to(len as usize))
                        .map_err(|mismatch| BundleError::Hash { offset, mismatch })?;
                    BundlePart::Chunk { offset, chunk }
                }
            });
        }
        Ok(Self { disk, parts })
    }
}

/// A part's length and kind.
fn take_len(cursor: &mut Cursor<'_>) -> Result<(u64, u64), DecodeError> {
    let coded = cursor.varint("length")?;
    let (len, kind) = (coded >> 2, coded & 3);
    if len == 0 {
        return Err(DecodeError::Invalid { what: "length" });
    }
    let limit = u64::from(MAX_PIECE_BYTES);
    if kind != KIND_ZEROS && len > limit {
        return Err(DecodeError::TooLarge { what: "length", found: len, limit });
    }
    Ok((len, kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{blocks::piece_id, chunk::RawChunk};

    fn chunk(offset: u64, data: &'static [u8]) -> BundlePart {
        BundlePart::Chunk { offset, chunk: RawChunk::new(Bytes::from_static(data)).hash() }
    }

    fn encode(parts: Vec<BundlePart>) -> Bytes {
        ChunkBundle { disk: 3, parts }.encode(&mut Compressor::new(), Level::Zstd(1))
    }

    #[test]
    fn the_bytes_of_a_bundle_are_fixed() {
        let bytes = encode(vec![
            chunk(10, b"abc"),
            BundlePart::Zero { offset: 4096, len: 4096 },
            BundlePart::Blocks { offset: 8192, data: Bytes::from_static(b"de") },
        ]);
        let mut expected = vec![3, 3, 0, 3, 20, 0xe6, 0x3f, 0, 12, 0x82, 0x80, 0x01, 9];
        expected.extend_from_slice(piece_id(b"abc").as_bytes());
        expected.extend_from_slice(&[0, 5]);
        expected.extend_from_slice(b"abcde");
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
