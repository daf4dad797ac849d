//! What an image holds, in memory: the comparison is about cores and bytes, not about disks.
//!
//! Invariant: holes and blocks of zeros are left out, so nothing that costs nothing is counted.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use longhaul_dedup::pages::PAGE_BYTES;
use longhaul_dedup::zeros::is_zero;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Bytes that one read takes.
const READ_BYTES: usize = 1 << 20;

/// The blocks of 4 KiB of an image that are not zero, one behind the other.
#[derive(Debug, Default)]
pub struct Image {
    /// Where each block lies on the disk, in blocks, ascending.
    places: Vec<u64>,
    /// The blocks' bytes.
    data: Vec<u8>,
}

impl Image {
    /// Reads a raw image, or any other file as if it were one.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = || format!("while reading {}", path.display());
        let file = File::open(path).with_context(shown)?;
        let mut image = Self::default();
        let mut offset = 0;
        loop {
            let begin = match rustix::fs::seek(&file, SeekFrom::Data(offset)) {
                Ok(begin) => begin / PAGE_BYTES as u64 * PAGE_BYTES as u64,
                Err(Errno::NXIO) => return Ok(image),
                Err(error) => return Err(error).with_context(shown),
            };
            offset = rustix::fs::seek(&file, SeekFrom::Hole(begin)).with_context(shown)?;
            rustix::fs::seek(&file, SeekFrom::Start(begin)).with_context(shown)?;
            image.read_extent(&file, begin, offset).with_context(shown)?;
        }
    }

    /// An image of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut image = Self::default();
        image.push(0, bytes);
        image
    }

    fn read_extent(&mut self, mut file: &File, begin: u64, end: u64) -> Result<()> {
        let mut at = begin;
        let mut buffer = vec![0; READ_BYTES];
        while at < end {
            let len = READ_BYTES.min((end - at) as usize);
            file.read_exact(&mut buffer[..len])?;
            self.push(at / PAGE_BYTES as u64, &buffer[..len]);
            at += len as u64;
        }
        Ok(())
    }

    fn push(&mut self, first: u64, bytes: &[u8]) {
        for (place, block) in (first..).zip(bytes.chunks(PAGE_BYTES)) {
            if !is_zero(block) && self.places.last().is_none_or(|last| *last < place) {
                self.places.push(place);
                self.data.extend_from_slice(block);
                // The end of a file that is no multiple of a block.
                self.data.resize(self.places.len() * PAGE_BYTES, 0);
            }
        }
    }

    /// Bytes that are not zero, in blocks.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// How many blocks that are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is nothing but zeros.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Where on the disk the block of this number is, in blocks.
    pub fn place(&self, block: usize) -> u64 {
        self.places[block]
    }

    /// The number of the block that is at this place.
    pub fn block_at(&self, place: u64) -> Option<usize> {
        self.places.binary_search(&place).ok()
    }

    /// How many blocks lie before this place.
    pub fn places_before(&self, place: u64) -> usize {
        self.places.partition_point(|at| *at < place)
    }

    /// The block of this number.
    pub fn block(&self, block: usize) -> &[u8; PAGE_BYTES] {
        self.data[block * PAGE_BYTES..].first_chunk().expect("every block is whole")
    }

    /// Blocks without a hole or zeros between them, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut begin = 0;
        std::iter::from_fn(move || {
            let first = *self.places.get(begin)?;
            let along = (first..).zip(&self.places[begin..]).take_while(|(at, place)| at == *place);
            let run = begin..begin + along.count();
            begin = run.end;
            Some(run)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_zero_is_there() {
        let mut bytes = vec![0; 9 * PAGE_BYTES + 10];
        for at in [PAGE_BYTES, 2 * PAGE_BYTES + 7, 8 * PAGE_BYTES, 9 * PAGE_BYTES] {
            bytes[at] = 1;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        for image in [Image::read(file.path()).unwrap(), Image::of(&bytes)] {
            assert_eq!(image.runs().collect::<Vec<_>>(), [0..2, 2..4]);
            assert_eq!((image.place(1), image.block_at(8), image.block_at(7)), (2, Some(2), None));
            assert_eq!(image.data().len(), 4 * PAGE_BYTES);
        }
    }
}
