//! The entries of one image, gathered in any order and sorted in bounded memory.
//!
//! Invariant: at most [`BUFFER_ENTRIES`] entries are in memory; the rest lies in spilled runs, which are
//! nobody's until [`Places::finish`](super::Places::finish) has merged them, and vanish with the builder.

use std::{fs, path::PathBuf};

use super::{
    Place, PlacesError, block_key, blocks_of,
    format::{Entry, RunFacts},
    io_error,
    merge::{self, Input},
    piece_key,
    run::{Run, RunWriter},
};
use crate::{
    blocks::Scan,
    recipe::{Claim, RecipeEntry, Sample},
};

/// Entries that are sorted in memory: 16 MiB. Tests want several spills of few entries.
pub(super) const BUFFER_ENTRIES: usize = if cfg!(test) { 1 << 8 } else { 1 << 20 };
/// Spilled runs that are merged at once; each takes a buffer.
const SPILLS_MAX: usize = if cfg!(test) { 4 } else { 64 };

/// Gathers what one image holds.
#[derive(Debug)]
pub struct Builder {
    /// Spilled runs begin with this path.
    stem: PathBuf,
    buffer: Vec<Entry>,
    spilled: Vec<(PathBuf, RunFacts)>,
    spills: u64,
}

impl Builder {
    pub(super) fn new(stem: PathBuf) -> Self {
        Self { stem, buffer: Vec::new(), spilled: Vec::new(), spills: 0 }
    }

    /// The image holds this piece.
    ///
    /// # Errors
    /// What was gathered cannot be spilled.
    pub fn add_piece(&mut self, piece: &RecipeEntry) -> Result<(), PlacesError> {
        // Longer than any piece: no entry is made of it.
        let blocks = u8::try_from(blocks_of(piece.len.into())).unwrap_or(u8::MAX);
        self.add(piece_key(&piece.id), Place { image: 0, offset: piece.offset, blocks })
    }

    /// The image holds this block.
    ///
    /// # Errors
    /// What was gathered cannot be spilled.
    pub fn add_sample(&mut self, sample: &Sample) -> Result<(), PlacesError> {
        self.add(block_key(sample.id), Place { image: 0, offset: sample.offset, blocks: 0 })
    }

    /// The image holds what was found by reading it.
    ///
    /// # Errors
    /// What was gathered cannot be spilled.
    pub fn add_scan(&mut self, scan: &Scan) -> Result<(), PlacesError> {
        scan.pieces.iter().try_for_each(|piece| self.add_piece(&piece.entry()))?;
        scan.samples().try_for_each(|sample| self.add_sample(&sample))
    }

    /// The image holds what its recipe claims.
    ///
    /// # Errors
    /// What was gathered cannot be spilled.
    pub fn add_claim(&mut self, claim: &Claim) -> Result<(), PlacesError> {
        match claim {
            Claim::Piece(piece) => self.add_piece(piece),
            Claim::Sample(sample) => self.add_sample(sample),
            // An entry has no room for a place within a block.
            Claim::Grain(_) => Ok(()),
        }
    }

    /// Whether nothing was gathered.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty() && self.spilled.is_empty()
    }

    fn add(&mut self, key: u64, place: Place) -> Result<(), PlacesError> {
        // What no entry can be made of is a source less.
        self.buffer.extend(Entry::new(key, place));
        if self.buffer.len() >= BUFFER_ENTRIES { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> Result<(), PlacesError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if self.spilled.len() == SPILLS_MAX {
            self.merge_spilled()?;
        }
        self.buffer.sort_unstable();
        let buffer = std::mem::take(&mut self.buffer);
        self.write(|out| buffer.iter().try_for_each(|entry| out.push(*entry)))?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    fn write(
        &mut self,
        content: impl FnOnce(&mut RunWriter) -> std::io::Result<()>,
    ) -> Result<(), PlacesError> {
        let mut path = self.stem.clone().into_os_string();
        path.push(format!("-{:x}", self.spills));
        let path = PathBuf::from(path);
        let failed = "what was gathered of an image cannot be written";
        let mut out = RunWriter::create(&path, self.spills).map_err(io_error(&path, failed))?;
        self.spills += 1;
        let facts = content(&mut out).and_then(|()| out.finish());
        match facts {
            Ok(facts) => {
                self.spilled.push((path, facts));
                Ok(())
            }
            Err(error) => {
                let _ = fs::remove_file(&path);
                Err(io_error(&path, failed)(error))
            }
        }
    }

    fn merge_spilled(&mut self) -> Result<(), PlacesError> {
        let runs = self.open()?;
        self.write(|out| {
            let inputs: Vec<Input<'_>> =
                runs.iter().map(|run| Input { run, image: None }).collect();
            let damaged = merge::merge(&inputs, &Default::default(), out)?;
            if damaged.is_empty() { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
        })?;
        let merged = self.spilled.len() - 1;
        for (path, _) in self.spilled.drain(..merged) {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    fn open(&self) -> Result<Vec<Run>, PlacesError> {
        let opened = self.spilled.iter().map(|(path, facts)| {
            Run::open(path, facts).map_err(io_error(path, "what was gathered cannot be read"))
        });
        opened.collect()
    }

    /// All entries, in runs.
    pub(super) fn into_runs(mut self) -> Result<Vec<Run>, PlacesError> {
        self.spill()?;
        self.open()
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        for (path, _) in &self.spilled {
            let _ = fs::remove_file(path);
        }
    }
}
