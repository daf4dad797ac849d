//! The agent's index of images: built from the pools, shown, checked.
//!
//! Invariant: an image that the index has as it is now is not read again, and an agent whose index cannot be
//! used does everything else that agents do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use longhaul_dedup::blocks::{self, BLOCK_BYTES, PARCEL_BYTES};
use longhaul_dedup::places::{Builder, Indexed, Places, PlacesError, Wanted};
use longhaul_dedup::recipe::ImageIdentity;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::control::{
    Failure, IndexProgress, IndexRequest, IndexSummary, IndexWork, IndexedImage, IndexedState,
    chain,
};
use crate::migration::known::{Taken, take_record};

/// Files of one pool that are looked at.
const POOL_FILES_MAX: usize = 1 << 16;
/// "QFI\xfb", with which a qcow2 image begins (QEMU's docs/interop/qcow2): only raw ones are copied from.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The index of one agent.
#[derive(Debug)]
pub struct ImageIndex {
    places: Result<Arc<Places>, Failure>,
    pools: BTreeMap<String, PathBuf>,
    /// Held by whoever works on it at an operator's wish: one at a time.
    working: Mutex<()>,
}

impl ImageIndex {
    /// Opens the index in `dir` over the images in these pools.
    pub fn open(dir: &Path, pools: BTreeMap<String, PathBuf>) -> Arc<Self> {
        let places = Places::open(dir).map(Arc::new).map_err(|error| failed(&error));
        match &places {
            Ok(places) if places.was_lost() => {
                tracing::warn!(
                    "the index of images was damaged, and is empty: `longhaul index build`"
                );
            }
            Ok(_) => {}
            Err(failure) => {
                tracing::warn!(what = failure.what, "images are found by their records alone");
            }
        }
        Arc::new(Self { places, pools, working: Mutex::new(()) })
    }

    /// What a receiver looks into.
    pub fn places(&self) -> Option<Arc<Places>> {
        self.places.as_ref().ok().cloned()
    }

    /// Takes the records of all images in the pools in, in the background.
    pub fn take_records(self: &Arc<Self>) {
        let index = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let Ok(places) = &index.places else { return };
            for image in index.pools.values().flat_map(|dir| raw_images(dir)) {
                if let Err(error) = take_record(places, &image) {
                    tracing::warn!(image = %image.display(), error = chain(&error), "not in the index");
                    return;
                }
            }
        });
    }

    /// Does what is asked, which may take as long as reading all images. `tell` hears how far it is.
    ///
    /// # Errors
    /// The index cannot be used, or a subject is no pool and no image of one.
    pub fn work(
        &self,
        request: &IndexRequest,
        mut tell: impl FnMut(IndexProgress),
    ) -> Result<IndexSummary, Failure> {
        let places = self.places.clone()?;
        let work = match request {
            IndexRequest::Show => None,
            IndexRequest::Build { subjects } => {
                let _alone = self.working.lock().unwrap_or_else(PoisonError::into_inner);
                Some(self.build(&places, subjects, &mut tell)?)
            }
            IndexRequest::Check => {
                let _alone = self.working.lock().unwrap_or_else(PoisonError::into_inner);
                let total = places.snapshot().summary().entries;
                let told = |read| tell(IndexProgress { image: String::new(), read, total });
                let checked = places.check(told).map_err(|error| failed(&error))?;
                Some(IndexWork { damaged_pages: checked.damaged_pages, ..IndexWork::default() })
            }
        };
        Ok(summary(&places, work))
    }

    fn build(
        &self,
        places: &Places,
        subjects: &[String],
        tell: &mut impl FnMut(IndexProgress),
    ) -> Result<IndexWork, Failure> {
        let images = self.subjects(subjects)?;
        let mut work = IndexWork::default();
        let is_gone = |image: &Indexed| !image.path.exists();
        work.dropped =
            places.snapshot().images().filter(|(image, _)| is_gone(image)).count() as u64;
        places.drop_images(is_gone).map_err(|error| failed(&error))?;
        for image in images {
            match take_record(places, &image).map_err(|error| failed(&error))? {
                Taken::Added => work.records_taken += 1,
                Taken::Known => work.unchanged += 1,
                Taken::Nothing => match take_image(places, &image, tell) {
                    Ok(Some(bytes)) => {
                        work.images_read += 1;
                        work.bytes_read += bytes;
                    }
                    Ok(None) => work.unchanged += 1,
                    Err(Unreadable::Image(error)) => {
                        work.failed.push(format!("{}: {error}", image.display()));
                    }
                    Err(Unreadable::Index(error)) => return Err(failed(&error)),
                },
            }
        }
        Ok(work)
    }

    /// The raw images that are meant.
    fn subjects(&self, subjects: &[String]) -> Result<Vec<PathBuf>, Failure> {
        if subjects.is_empty() {
            return Ok(self.pools.values().flat_map(|dir| raw_images(dir)).collect());
        }
        let mut images = Vec::new();
        for subject in subjects {
            if let Some(dir) = self.pools.get(subject) {
                images.extend(raw_images(dir));
                continue;
            }
            let path = Path::new(subject);
            let pool = self.pools.values().find(|dir| path.parent() == Some(dir));
            if pool.is_none() || !is_raw_image(path) {
                return Err(Failure::refused(
                    format!("{subject} is no pool of this host, and no raw image in one"),
                    "name a pool of agent.toml, or the whole path of an image in its folder",
                ));
            }
            images.push(path.to_owned());
        }
        Ok(images)
    }
}

enum Unreadable {
    Image(io::Error),
    Index(PlacesError),
}

impl From<PlacesError> for Unreadable {
    fn from(error: PlacesError) -> Self {
        Self::Index(error)
    }
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Self::Image(error)
    }
}

/// Reads an image, unless the index has it as it is. The bytes that were read.
fn take_image(
    places: &Places,
    path: &Path,
    tell: &mut impl FnMut(IndexProgress),
) -> Result<Option<u64>, Unreadable> {
    let file = File::open(path)?;
    // Before anything is read: what is written meanwhile then shows.
    let identity = ImageIdentity::of(&file.metadata()?);
    let is_same = |image: &Indexed| image.path == path && image.whole && image.identity == identity;
    if places.snapshot().images().any(|(image, _)| is_same(image)) {
        return Ok(None);
    }
    let mut builder = places.builder();
    let mut read = 0;
    let mut at = 0;
    while let Some((start, end)) = data_at(&file, at, identity.size)? {
        read += add_stretch(&mut builder, &file, start, end)?;
        at = end;
        let image = path.display().to_string();
        tell(IndexProgress { image, read, total: identity.size });
    }
    let wanted = Wanted { path: path.to_owned(), bytes: identity.size, identity, record: None };
    places.finish(builder, wanted)?;
    Ok(Some(read))
}

/// The next data from `at` on, of one parcel at most, in whole blocks.
fn data_at(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    let block = BLOCK_BYTES as u64;
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => at.max(start / block * block),
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let parcel_end = (start / PARCEL_BYTES + 1) * PARCEL_BYTES;
    let hole = seek(file, SeekFrom::Hole(start)).unwrap_or(size);
    let end = hole.next_multiple_of(block).min(parcel_end).min(size);
    Ok((start < end).then_some((start, end)))
}

fn add_stretch(
    builder: &mut Builder,
    file: &File,
    start: u64,
    end: u64,
) -> Result<u64, Unreadable> {
    let mut data = vec![0; (end - start) as usize];
    file.read_exact_at(&mut data, start)?;
    builder.add_scan(&blocks::scan(&[(start, Bytes::from(data))]))?;
    Ok(end - start)
}

/// The raw images in a pool's folder.
fn raw_images(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.flatten().take(POOL_FILES_MAX).map(|entry| entry.path());
    let mut images: Vec<PathBuf> = paths.filter(|path| is_raw_image(path)).collect();
    images.sort();
    images
}

fn is_raw_image(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    if name.starts_with('.') || name.contains(".longhaul-") {
        return false;
    }
    let regular = fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0);
    let mut magic = [0; 4];
    let read = |magic: &mut [u8]| File::open(path)?.read_at(magic, 0);
    regular && read(&mut magic).is_ok() && magic != QCOW2_MAGIC
}

fn summary(places: &Places, work: Option<IndexWork>) -> IndexSummary {
    let snapshot = places.snapshot();
    let facts = snapshot.summary();
    let images: Vec<IndexedImage> = snapshot
        .images()
        .map(|(image, entries)| IndexedImage {
            path: image.path.display().to_string(),
            bytes: image.bytes,
            entries,
            state: state(image),
            was_read: image.record.is_none(),
        })
        .collect();
    let is_stale =
        |image: &&IndexedImage| matches!(image.state, IndexedState::Changed | IndexedState::Gone);
    let stale: u64 = images.iter().filter(is_stale).map(|image| image.entries).sum();
    IndexSummary {
        images,
        entries: facts.entries,
        stale_entries: facts.dropped_entries + stale,
        runs: facts.runs,
        damaged_runs: facts.damaged_runs,
        file_bytes: facts.file_bytes,
        memory_bytes: facts.memory_bytes,
        work,
    }
}

fn state(image: &Indexed) -> IndexedState {
    match fs::metadata(&image.path) {
        Err(_) => IndexedState::Gone,
        Ok(_) if !image.whole => IndexedState::Partial,
        Ok(file) if ImageIdentity::of(&file) == image.identity => IndexedState::Current,
        Ok(_) => IndexedState::Changed,
    }
}

fn failed(error: &PlacesError) -> Failure {
    Failure::failed(
        chain(error),
        "images are as they were; what is not in the index is found by records alone",
        "mend what is named and restart the agent; `longhaul index build` makes the index anew",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(index: &ImageIndex, subjects: &[&str]) -> Result<IndexSummary, Failure> {
        let subjects = subjects.iter().map(ToString::to_string).collect();
        index.work(&IndexRequest::Build { subjects }, |_| ())
    }

    #[test]
    fn what_did_not_change_is_not_read_again_and_what_is_gone_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("pool");
        fs::create_dir(&pool).unwrap();
        let mut noise = vec![0; 3 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        fs::write(pool.join("a.raw"), &noise).unwrap();
        // Mostly a hole, and an end that is no whole block.
        let sparse = File::create(pool.join("b.raw")).unwrap();
        sparse.set_len((64 << 20) + 700).unwrap();
        sparse.write_all_at(&noise[..9000], 40 << 20).unwrap();
        fs::write(pool.join("c.qcow2"), b"QFI\xfb and more").unwrap();
        let pools = BTreeMap::from([("default".to_owned(), pool.clone())]);
        let index = ImageIndex::open(&dir.path().join("index"), pools.clone());

        let built = build(&index, &[]).unwrap();
        let work = built.work.unwrap();
        assert_eq!((work.images_read, work.unchanged, built.images.len()), (2, 0, 2));
        assert!(work.bytes_read >= 3 << 20 && work.bytes_read < 5 << 20, "{}", work.bytes_read);
        assert!(built.images.iter().all(|image| image.state == IndexedState::Current));
        drop(index);

        let index = ImageIndex::open(&dir.path().join("index"), pools);
        let again = build(&index, &["default"]).unwrap().work.unwrap();
        assert_eq!((again.images_read, again.unchanged), (0, 2));
        fs::write(pool.join("a.raw"), &noise[5..]).unwrap();
        let shown = index.work(&IndexRequest::Show, |_| ()).unwrap();
        assert_eq!(shown.images[0].state, IndexedState::Changed);
        assert_eq!(shown.stale_entries, shown.images[0].entries);
        fs::remove_file(pool.join("b.raw")).unwrap();
        let a = pool.join("a.raw").display().to_string();
        let built = build(&index, &[&a]).unwrap();
        let work = built.work.unwrap();
        assert_eq!((work.images_read, work.dropped, built.images.len()), (1, 1, 1));
        assert_eq!(built.stale_entries, 0);
        let checked = index.work(&IndexRequest::Check, |_| ()).unwrap();
        assert_eq!((checked.damaged_runs, checked.work.unwrap().damaged_pages), (0, 0));
        assert!(build(&index, &["/etc/passwd"]).unwrap_err().what.contains("no pool"));
    }
}
