//! What the source's own images hold, recorded on the way: the ids are there, and a VM that comes back
//! finds in them what need not be sent again. An image that nobody wrote to since it was recorded
//! whole need not be read to be compared.
//!
//! Invariant: a record is relied upon without reading only while the image is, by its identity, what
//! it was when all of it was read. Otherwise it is a hint: whoever uses one reads and hashes what it
//! names first. One that cannot be written costs a later move bytes, never this one its success.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use longhaul_dedup::blocks::{Piece, Scan};
use longhaul_dedup::recipe::{ImageIdentity, RecipeEntry, RecipeError, RecipeLog, Sample};
use longhaul_dedup::summary::Summary;

use super::layout::Part;

/// An image that was written to more recently may be written to again without another time.
const SETTLED_AFTER: Duration = Duration::from_secs(2);
/// The generation of a record that no seed was kept under.
const NO_GENERATION: u64 = 0;

/// The records of one VM's images, in the order of its disks.
pub(in super::super) struct ImageRecord {
    images: Vec<Option<PathBuf>>,
    /// No hypervisor has the images open.
    at_rest: bool,
    open: Vec<Mutex<Option<Open>>>,
}

struct Open {
    log: RecipeLog,
    /// The image before anything of it was read, if it had settled.
    before: Option<ImageIdentity>,
    /// The record was complete and the image untouched.
    trusted: bool,
}

/// What a record says of a part that need not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recalled {
    pub(super) summary: Summary,
    /// Bytes of its pieces.
    pub(super) data_bytes: u64,
}

impl ImageRecord {
    /// Records of the images at these paths; of those without one nothing is recorded.
    pub(in super::super) fn new(images: Vec<Option<PathBuf>>) -> Self {
        let open = images.iter().map(|_| Mutex::default()).collect();
        Self { images, at_rest: false, open }
    }

    /// The same of images that no hypervisor has open: those need not be read if they were recorded
    /// whole. Of a disk in use an image's times are no proof that would be good enough.
    pub(in super::super) fn at_rest(images: Vec<Option<PathBuf>>) -> Self {
        Self { at_rest: true, ..Self::new(images) }
    }

    /// Begins to record disks of these sizes: anew, because all of them is about to be read, or
    /// behind what is there.
    pub(in super::super) fn begin(&self, disk_bytes: &[u64], anew: bool) {
        for ((image, open), &bytes) in self.images.iter().zip(&self.open).zip(disk_bytes) {
            let Some(image) = image else { continue };
            let path = RecipeLog::path_for(image);
            let before = if anew && self.at_rest { settled(image) } else { None };
            let there =
                RecipeLog::open(&path).ok().filter(|log| log.recipe().image_bytes() == bytes);
            let is_complete =
                |log: &RecipeLog| log.complete().is_some_and(|kept| Some(kept.image) == before);
            let trusted = there.as_ref().is_some_and(is_complete);
            let log = match there {
                Some(log) if trusted || !anew => Some(log),
                None if !anew => None,
                _ => RecipeLog::create(&path, bytes).map_err(|error| not_recorded(&error)).ok(),
            };
            *lock(open) = log.map(|log| Open { log, before, trusted });
        }
    }

    /// What is recorded of these parts of a disk that nobody wrote to since, each by itself.
    pub(super) fn recall(&self, disk: u16, parts: &[Part]) -> Vec<Option<Recalled>> {
        let open = self.open.get(usize::from(disk)).map(lock);
        let trusted = open.as_ref().and_then(|open| open.as_ref()).filter(|open| open.trusted);
        let recalled = |part: &Part| {
            let pieces = trusted?.log.recipe().known(&part.place)?;
            let data_bytes = pieces.iter().map(|piece| u64::from(piece.len)).sum();
            Some(Recalled { summary: Summary::of(&part.place, pieces), data_bytes })
        };
        parts.iter().map(recalled).collect()
    }

    /// The disk holds these pieces, and zeros there.
    pub(super) fn note(&self, disk: u16, scan: &Scan, zeros: &[Range<u64>]) {
        self.keep(disk, |open| note(&mut open.log, scan, zeros));
    }

    /// All of the disk was read, or need not be. What is recorded is believed from now on, if nobody
    /// wrote to the image meanwhile.
    pub(super) fn is_whole(&self, disk: u16) {
        let Some(Some(image)) = self.images.get(usize::from(disk)) else { return };
        let now = settled(image);
        self.keep(disk, |open| match open.before {
            Some(before) if Some(before) == now && open.log.complete().is_none() => {
                open.log.mark_complete(NO_GENERATION, before)
            }
            _ => Ok(()),
        });
    }

    fn keep(&self, disk: u16, keep: impl FnOnce(&mut Open) -> Result<(), RecipeError>) {
        let Some(open) = self.open.get(usize::from(disk)) else { return };
        let mut slot = lock(open);
        if let Some(open) = slot.as_mut()
            && let Err(error) = keep(open)
        {
            not_recorded(&error);
            *slot = None;
        }
    }
}

fn lock(open: &Mutex<Option<Open>>) -> MutexGuard<'_, Option<Open>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The identity of an image file that tells whether it was written to: not of a device, whose times
/// say nothing, nor of a file that was written to just now.
fn settled(image: &Path) -> Option<ImageIdentity> {
    let metadata = std::fs::metadata(image).ok().filter(std::fs::Metadata::is_file)?;
    let age = SystemTime::now().duration_since(metadata.modified().ok()?).ok()?;
    (age >= SETTLED_AFTER).then(|| ImageIdentity::of(&metadata))
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
