//! A recipe's file read as it was written, without remembering what was read.
//!
//! Invariant: memory does not depend on the file's size. What was superseded or voided later comes, too: this
//! is for whoever hashes what is claimed anyway.

use std::io::{self, Read};

use super::{
    GrainSample, ReadError, RecipeEntry, Sample, admits,
    format::{self, HEADER_BYTES, HeaderError, Record},
};

/// What a record says that an image held when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A piece.
    Piece(RecipeEntry),
    /// A block that belongs into the index.
    Sample(Sample),
    /// A grain by which similar stretches are found.
    Grain(GrainSample),
}

/// Everything that a recipe's file claims, up to its end or its first record that cannot be believed.
#[derive(Debug)]
pub struct Claims<R> {
    input: R,
    at: u64,
    image_bytes: u64,
    ready: std::vec::IntoIter<Claim>,
}

impl<R: Read> Claims<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It cannot be read, or is not a recipe's.
    pub fn read(mut input: R) -> Result<Self, ReadError> {
        let mut header = [0; HEADER_BYTES];
        input.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Header(HeaderError::NotARecipe),
            _ => ReadError::Io(error),
        })?;
        let image_bytes = format::decode_header(&header)?;
        Ok(Self { input, at: HEADER_BYTES as u64, image_bytes, ready: Vec::new().into_iter() })
    }

    /// Size of the image as its guest sees it.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    fn fill(&mut self) -> io::Result<bool> {
        let Some((record, bytes)) = format::read_record(&mut self.input, self.at)? else {
            return Ok(false);
        };
        if !admits(self.image_bytes, &record) {
            return Ok(false);
        }
        self.at += bytes;
        let claims: Vec<Claim> = match record {
            Record::Entries(entries) => entries.into_iter().map(Claim::Piece).collect(),
            Record::Samples(samples) => samples.into_iter().map(Claim::Sample).collect(),
            Record::Grains(grains) => grains.into_iter().map(Claim::Grain).collect(),
            Record::Void(_) | Record::Zeros(_) | Record::Complete(_) => Vec::new(),
        };
        self.ready = claims.into_iter();
        Ok(true)
    }
}

impl<R: Read> Iterator for Claims<R> {
    type Item = io::Result<Claim>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(claim) = self.ready.next() {
                return Some(Ok(claim));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{blocks::ShortId, id::ChunkId, recipe::RecipeLog};

    #[test]
    fn what_was_written_is_claimed_in_order_and_nothing_behind_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe");
        let mut log = RecipeLog::create(&path, 1 << 20).unwrap();
        let piece = |n: u64| RecipeEntry { offset: n * 4096, len: 4096, id: ChunkId::of(&[7]) };
        let sample = Sample { offset: 0, id: ShortId::from_bytes([0; 8]) };
        log.append(&[piece(0), piece(1)]).unwrap();
        log.append_samples(&[sample]).unwrap();
        log.void(Some(0..4096)).unwrap();
        log.append(&[piece(2)]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = |bytes: &[u8]| -> Vec<Claim> {
            Claims::read(bytes).unwrap().collect::<io::Result<_>>().unwrap()
        };
        let all = [
            Claim::Piece(piece(0)),
            Claim::Piece(piece(1)),
            Claim::Sample(sample),
            Claim::Piece(piece(2)),
        ];
        assert_eq!(read(&bytes), all);
        assert_eq!(Claims::read(&bytes[..]).unwrap().image_bytes(), 1 << 20);
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(read(&damaged), all[..3]);
        assert_eq!(read(&bytes[..bytes.len() - 1]), all[..3]);
        assert!(Claims::read(&bytes[..63]).is_err());
    }
}
