//! Bytes and the trust that they have earned, as types.
//!
//! ```text
//! disk, peer --> RawChunk --hash()-------> VerifiedChunk { id, data }
//!                         --verify(id)--/   and the hashes of its blocks
//! ```
//! Invariant: hashing is the only way to a [`VerifiedChunk`], so whoever holds one may write its
//! data under its id without looking again.

use bytes::Bytes;

use crate::{
    blocks::{hash_blocks, id_of_blocks},
    id::ChunkId,
    pages::PageHash,
};

/// Bytes that nobody has hashed yet.
#[derive(Clone, PartialEq, Eq)]
pub struct RawChunk {
    data: Bytes,
}

impl RawChunk {
    /// Bytes as they were read or received.
    pub fn new(data: Bytes) -> Self {
        Self { data }
    }

    /// Names the bytes by what they are: for data whose origin we are.
    pub fn hash(self) -> VerifiedChunk {
        let hashes = hash_blocks(&self.data);
        VerifiedChunk { id: id_of_blocks(&hashes), data: self.data, hashes }
    }

    /// Checks that the bytes are those that `id` names: for data that somebody else named.
    pub fn verify(self, id: ChunkId) -> Result<VerifiedChunk, HashMismatch> {
        let bytes = self.data.len();
        let chunk = self.hash();
        if chunk.id == id {
            Ok(chunk)
        } else {
            Err(HashMismatch { expected: id, found: chunk.id, bytes })
        }
    }
}

/// Bytes that are what their id says.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedChunk {
    id: ChunkId,
    data: Bytes,
    hashes: Vec<PageHash>,
}

impl VerifiedChunk {
    /// The [`piece_id`](crate::blocks::piece_id) of the bytes.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// The bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The hashes of its blocks, which its id is the hash of.
    pub fn hashes(&self) -> &[PageHash] {
        &self.hashes
    }
}

/// [`RawChunk::verify`] in one call.
pub fn verify(id: ChunkId, bytes: Bytes) -> Result<VerifiedChunk, HashMismatch> {
    RawChunk::new(bytes).verify(id)
}

/// Bytes are not what their id says: damaged, stale, or from a peer that is not honest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bytes} bytes hash to {}, not to {}: ask for the chunk again",
    found.short(),
    expected.short()
)]
pub struct HashMismatch {
    /// The id that was claimed.
    pub expected: ChunkId,
    /// The id that the bytes have.
    pub found: ChunkId,
    /// How many bytes there were.
    pub bytes: usize,
}

// Guest data stays out of logs: only lengths and ids are printed.
impl std::fmt::Debug for RawChunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawChunk").field("bytes", &self.data.len()).finish()
    }
}

impl std::fmt::Debug for VerifiedChunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedChunk")
            .field("id", &self.id)
            .field("bytes", &self.data.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::piece_id;

    #[test]
    fn only_the_right_bytes_become_a_verified_chunk() {
        let chunk = RawChunk::new(Bytes::from_static(b"a block")).hash();
        assert_eq!(verify(chunk.id(), Bytes::from_static(b"a block")).unwrap(), chunk);
        let error = verify(chunk.id(), Bytes::from_static(b"a clock")).unwrap_err();
        assert_eq!(error.expected, chunk.id());
        assert_eq!(error.found, piece_id(b"a clock"));
        assert_eq!(error.bytes, 7);
    }
}
