//! Reading the whole index, and putting right what is damaged.
//!
//! Invariant: what is put right has lost what was damaged and nothing else, and the images that it may have
//! told of are named: reading them again makes the index whole.

use std::{path::PathBuf, sync::Arc};

use super::{Places, PlacesError, io_error, run::Run};

/// Entries after which it is told how far a check is.
const TOLD_ENTRIES: u64 = 1 << 20;

/// What came of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Entries that were read and are good.
    pub entries: u64,
    /// Pages of entries that are damaged.
    pub damaged_pages: u64,
    /// Runs in which anything is damaged.
    pub damaged_runs: u64,
    /// Images of which something may be missing, this time or an earlier one.
    pub images: Vec<PathBuf>,
}

impl Places {
    /// Reads every run, and writes damaged ones anew without what is damaged. `read` is told of the
    /// entries after each million of them.
    ///
    /// # Errors
    /// The file system refuses; the index is then as it was.
    pub fn check(&self, mut read: impl FnMut(u64)) -> Result<Checked, PlacesError> {
        let snapshot = self.snapshot();
        let mut checked = Checked::default();
        let mut damaged: Vec<Arc<Run>> = Vec::new();
        for run in &snapshot.runs {
            let mut reader = run.reader();
            let path = self.run_path(run);
            while reader.next().map_err(io_error(&path, "cannot be read"))?.is_some() {
                checked.entries += 1;
                if checked.entries.is_multiple_of(TOLD_ENTRIES) {
                    read(checked.entries);
                }
            }
            checked.damaged_pages += reader.damaged();
            if reader.damaged() > 0 || run.is_damaged() {
                damaged.push(Arc::clone(run));
            }
        }
        checked.damaged_runs = damaged.len() as u64;
        // One after the other: each is as large as it was.
        for run in damaged {
            self.mend(&[run])?;
        }
        let snapshot = self.snapshot();
        let partial = snapshot.images().filter(|(image, _)| !image.whole);
        checked.images = partial.map(|(image, _)| image.path.clone()).collect();
        Ok(checked)
    }
}
