//! The name of a piece of data: the BLAKE3-256 hash of its bytes.
//!
//! Invariant: a [`ChunkId`] says nothing about who holds the bytes or whether anyone checked them;
//! only [`VerifiedChunk`](crate::chunk::VerifiedChunk) binds an id to bytes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The BLAKE3-256 hash of a chunk's bytes.
///
/// It is printed as 64 lower-case hex digits; serialized so too where the format is meant for
/// people, and as its 32 bytes where it is not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId([u8; Self::BYTES]);

impl ChunkId {
    /// Bytes in an id.
    pub const BYTES: usize = 32;

    /// The id of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    /// An id that somebody else computed.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Its first 8 hex digits, enough to tell ids apart in a log line.
    pub const fn short(&self) -> ShortId {
        let [a, b, c, d, ..] = self.0;
        ShortId([a, b, c, d])
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({})", self.short())
    }
}

/// The beginning of a [`ChunkId`], for people.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ShortId([u8; 4]);

impl fmt::Display for ShortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ShortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShortId({self})")
    }
}

/// A text that is not a chunk id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a chunk id is 64 lower-case hex digits")]
pub struct NotAChunkId;

impl FromStr for ChunkId {
    type Err = NotAChunkId;

    fn from_str(text: &str) -> Result<Self, NotAChunkId> {
        let digits = text.as_bytes();
        if digits.len() != 2 * Self::BYTES {
            return Err(NotAChunkId);
        }
        let mut bytes = [0; Self::BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for ChunkId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for ChunkId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
        } else {
            <[u8; Self::BYTES]>::deserialize(deserializer).map(Self)
        }
    }
}

fn hex_digit(digit: u8) -> Result<u8, NotAChunkId> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(NotAChunkId),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BLAKE3 of nothing, as its specification's test vectors have it.
    const OF_NOTHING: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn an_id_is_printed_and_read_as_hex() {
        let id = ChunkId::of(b"");
        assert_eq!(id.to_string(), OF_NOTHING);
        assert_eq!(id.short().to_string(), "af1349b9");
        assert_eq!(OF_NOTHING.parse(), Ok(id));
        for wrong in ["", "af13", &OF_NOTHING.to_uppercase(), &OF_NOTHING.replace('a', "g")] {
            assert_eq!(wrong.parse::<ChunkId>(), Err(NotAChunkId), "{wrong}");
        }
    }

    #[test]
    fn an_id_is_hex_for_people_and_bytes_for_machines() {
        let id = ChunkId::of(b"");
        assert_eq!(serde_json::to_string(&id).unwrap(), format!("\"{OF_NOTHING}\""));
        assert_eq!(serde_json::from_str::<ChunkId>(&format!("\"{OF_NOTHING}\"")).unwrap(), id);
        assert!(serde_json::from_str::<ChunkId>("\"af\"").is_err());
        let binary = postcard::to_stdvec(&id).unwrap();
        assert_eq!(binary, id.as_bytes());
        assert_eq!(postcard::from_bytes::<ChunkId>(&binary).unwrap(), id);
    }
}
