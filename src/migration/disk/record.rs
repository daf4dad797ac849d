//! What the source's own images hold, recorded on the way: the ids are there, and a VM that comes back
//! finds in them what need not be sent again.
//!
//! Invariant: a hint and no more. Whoever uses a record reads and hashes what it names first, and one
//! that cannot be written costs a later move bytes, never this one its success.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use longhaul_dedup::blocks::{Piece, Scan};
use longhaul_dedup::recipe::{RecipeEntry, RecipeError, RecipeLog, Sample};

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

    /// The disk holds these pieces, and zeros there.
    pub(super) fn note(&self, disk: u16, scan: &Scan, zeros: &[Range<u64>]) {
        self.keep(disk, |log| note(log, scan, zeros));
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

/// Records what was found by reading: pieces with their samples, and zeros.
pub(super) fn note(
    log: &mut RecipeLog,
    scan: &Scan,
    zeros: &[Range<u64>],
) -> Result<(), RecipeError> {
    let entries: Vec<RecipeEntry> = scan.pieces.iter().map(Piece::entry).collect();
    let samples: Vec<Sample> = scan.samples().collect();
    log.append(&entries)?;
    log.append_samples(&samples)?;
    log.append_zeros(zeros.iter().cloned())
}

fn not_recorded(error: &RecipeError) {
    tracing::debug!(%error, "what an image holds is not recorded");
}
