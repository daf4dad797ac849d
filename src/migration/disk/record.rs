//! What the source's own images hold, recorded on the way: the ids are there, and a VM that comes back
//! finds in them what need not be sent again.
//!
//! Invariant: a hint and no more. Whoever uses a record reads and hashes what it names first, and one
//! that cannot be written costs a later move bytes, never this one its success.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use longhaul_dedup::recipe::{RecipeEntry, RecipeError, RecipeLog};

/// The records of one VM's images, in the order of its disks.
pub(in super::super) struct ImageRecord {
    images: Vec<Option<PathBuf>>,
    logs: Vec<Mutex<Option<RecipeLog>>>,
}

impl ImageRecord {
    /// Records of the images at these paths; of those without one nothing is recorded.
    pub(in super::super) fn new(images: Vec<Option<PathBuf>>) -> Self {
        let logs = images.iter().map(|_| Mutex::default()).collect();
        Self { images, logs }
    }

    /// Begins to record disks of these sizes: anew, because all of them is about to be read, or
    /// behind what is there.
    pub(in super::super) fn begin(&self, disk_bytes: &[u64], anew: bool) {
        for ((image, log), &bytes) in self.images.iter().zip(&self.logs).zip(disk_bytes) {
            let Some(image) = image else { continue };
            let path = RecipeLog::path_for(image);
            let opened =
                if anew { RecipeLog::create(&path, bytes) } else { RecipeLog::open(&path) };
            let opened = opened.map_err(|error| not_recorded(&error)).ok();
            *log.lock().unwrap_or_else(PoisonError::into_inner) =
                opened.filter(|log| log.recipe().image_bytes() == bytes);
        }
    }

    /// The disk holds these chunks.
    pub(super) fn chunks(&self, disk: u16, entries: &[RecipeEntry]) {
        self.keep(disk, |log| log.append(entries));
    }

    /// Nothing is known any more of these parts of the disk.
    pub(super) fn void(&self, disk: u16, ranges: impl Iterator<Item = Range<u64>>) {
        self.keep(disk, |log| log.void(ranges));
    }

    fn keep(&self, disk: u16, keep: impl FnOnce(&mut RecipeLog) -> Result<(), RecipeError>) {
        let Some(log) = self.logs.get(usize::from(disk)) else { return };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = log.as_mut()
            && let Err(error) = keep(open)
        {
            not_recorded(&error);
            *log = None;
        }
    }
}

fn not_recorded(error: &RecipeError) {
    tracing::debug!(%error, "what an image holds is not recorded");
}
