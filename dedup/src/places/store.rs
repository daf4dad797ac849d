//! The index as a whole: opened, looked into, added to, one writer at a time.
//!
//! Invariant: the manifest is replaced only by a complete and synced one, after the runs that it names are
//! durable and before those that it no longer names are removed. So a crash leaves the old index or the
//! new one, and files that nobody names, which the next [`Places::open`] removes.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Builder, MAX_IMAGES, MAX_PLACES, Place, PlacesError,
    format::{Indexed, MAX_MANIFEST_BYTES, Manifest, ManifestError},
    io_error,
    merge::{self, Input},
    run::{self, Run, RunWriter},
};
use crate::recipe::ImageIdentity;

const MANIFEST: &str = "manifest";
const MANIFEST_NEW: &str = "manifest.new";
/// All runs are merged when so large a share of their entries, one in so many, is of dropped images.
const STALE_SHARE: u64 = 4;

/// An image whose entries are to become part of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where it lies. What the index has of the same path is dropped.
    pub path: PathBuf,
    /// Its size in bytes, as a guest sees it.
    pub bytes: u64,
    /// The file as it was before the entries were made: a later change then shows.
    pub identity: ImageIdentity,
    /// The record beside it that the entries are from; `None` if the image was read.
    pub record: Option<ImageIdentity>,
}

/// The index in a folder of its own. Only one process may have it open.
#[derive(Debug)]
pub struct Places {
    dir: PathBuf,
    current: Mutex<Snapshot>,
    /// Held by whoever changes the index: the number of the next run.
    next_run: Mutex<u64>,
    builders: AtomicU64,
    lost: bool,
}

/// The index as it was at one moment; it stays readable while the index is changed.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub(super) manifest: Arc<Manifest>,
    /// As the manifest has them.
    pub(super) runs: Vec<Arc<Run>>,
}

/// What there is of an index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Images that it tells of.
    pub images: u64,
    /// Entries, of dropped images too.
    pub entries: u64,
    /// Entries of dropped images, which a merge will leave out.
    pub dropped_entries: u64,
    /// Runs, each of which costs a look-up a page.
    pub runs: u64,
    /// Bytes of the runs' files.
    pub file_bytes: u64,
    /// Memory that the fences take, in bytes.
    pub memory_bytes: u64,
    /// Runs in which damage was met since the index was opened.
    pub damaged_runs: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is guarded here is ever left half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Places {
    /// Opens the index in `dir`, or begins one. What a crash left is removed.
    ///
    /// A manifest that is damaged costs the index, a run that is missing what was in it.
    ///
    /// # Errors
    /// The file system refuses, or another release wrote the index.
    pub fn open(dir: &Path) -> Result<Self, PlacesError> {
        fs::create_dir_all(dir).map_err(io_error(dir, "the folder cannot be made"))?;
        let path = dir.join(MANIFEST);
        let (mut manifest, lost) = match read_manifest(&path)? {
            Ok(manifest) => (manifest, false),
            Err(reason @ ManifestError::Version { .. }) => {
                return Err(PlacesError::Unreadable { path, reason });
            }
            Err(_) => (Manifest::default(), true),
        };
        let mut runs = Vec::new();
        let mut missing = BTreeSet::new();
        manifest.runs.sort_by_key(|run| Reverse(run.entries()));
        for facts in &manifest.runs {
            let path = run::path_of(dir, facts.id);
            match Run::open(&path, facts) {
                Ok(run) => runs.push(Arc::new(run)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    missing.insert(facts.id);
                }
                Err(error) => return Err(io_error(&path, "cannot be opened")(error)),
            }
        }
        manifest.lose(&missing);
        manifest.runs.retain(|run| !missing.contains(&run.id));
        let above = remove_orphans(dir, &manifest)?;
        let next_run = manifest.next_run.max(above);
        Ok(Self {
            dir: dir.to_owned(),
            current: Mutex::new(Snapshot { manifest: Arc::new(manifest), runs }),
            next_run: Mutex::new(next_run),
            builders: AtomicU64::new(0),
            lost,
        })
    }

    pub(super) fn run_path(&self, run: &Run) -> PathBuf {
        run::path_of(&self.dir, run.id())
    }

    /// Whether the manifest was damaged, and the index begun anew.
    pub fn was_lost(&self) -> bool {
        self.lost
    }

    /// The index as it is now.
    pub fn snapshot(&self) -> Snapshot {
        locked(&self.current).clone()
    }

    /// Begins to gather what an image holds. Any number of images may be gathered at once.
    pub fn builder(&self) -> Builder {
        let number = self.builders.fetch_add(1, Ordering::Relaxed);
        Builder::new(self.dir.join(format!("build-{number:x}")))
    }

    /// Makes what was gathered part of the index, durably, in place of what it had of the same path.
    ///
    /// # Errors
    /// The file system refuses, or there are too many images; the index is then as it was.
    pub fn finish(&self, builder: Builder, wanted: Wanted) -> Result<(), PlacesError> {
        let gathered = builder.into_runs()?;
        let mut next_run = locked(&self.next_run);
        let before = self.snapshot();
        let mut manifest = Manifest::clone(&before.manifest);
        manifest.drop_images(|image| image.path == wanted.path);
        let free = (0..MAX_IMAGES as u16).find(|number| !manifest.images.contains_key(number));
        let number = free.ok_or(PlacesError::TooManyImages)?;
        let Wanted { path, bytes, identity, record } = wanted;
        manifest.images.insert(number, Indexed { path, bytes, identity, record, whole: true });

        let entries = gathered.iter().map(Run::entries).sum::<u64>();
        let merged = if manifest.is_stale() {
            before.runs.clone()
        } else {
            with_like_size(&before.runs, entries)
        };
        self.rewrite(&mut next_run, &before, manifest, &merged, &gathered, number)
    }

    /// Drops the images of which `gone` says so; a later merge leaves their entries out.
    ///
    /// # Errors
    /// The file system refuses; the index is then as it was.
    pub fn drop_images(&self, gone: impl Fn(&Indexed) -> bool) -> Result<(), PlacesError> {
        let mut next_run = locked(&self.next_run);
        let before = self.snapshot();
        let mut manifest = Manifest::clone(&before.manifest);
        if !manifest.drop_images(gone) {
            return Ok(());
        }
        let merged = if manifest.is_stale() { before.runs.clone() } else { Vec::new() };
        self.rewrite(&mut next_run, &before, manifest, &merged, &[], 0)
    }

    /// Writes these runs anew, without what is damaged in them, and marks their images.
    pub(super) fn mend(&self, damaged: &[Arc<Run>]) -> Result<(), PlacesError> {
        let mut next_run = locked(&self.next_run);
        let before = self.snapshot();
        let mut manifest = Manifest::clone(&before.manifest);
        manifest.lose(&damaged.iter().map(|run| run.id()).collect());
        // A merge may have taken them up meanwhile.
        let still = |run: &&Arc<Run>| before.runs.iter().any(|known| known.id() == run.id());
        let damaged: Vec<Arc<Run>> = damaged.iter().filter(still).cloned().collect();
        self.rewrite(&mut next_run, &before, manifest, &damaged, &[], 0)
    }

    /// Puts one run in place of `merged` and what was gathered of image `number`, and `manifest`, with the
    /// runs corrected, in place of the one before.
    fn rewrite(
        &self,
        next_run: &mut u64,
        before: &Snapshot,
        mut manifest: Manifest,
        merged: &[Arc<Run>],
        gathered: &[Run],
        number: u16,
    ) -> Result<(), PlacesError> {
        let old: BTreeSet<u64> = merged.iter().map(|run| run.id()).collect();
        let mut runs: Vec<Arc<Run>> =
            before.runs.iter().filter(|run| !old.contains(&run.id())).cloned().collect();
        if !merged.is_empty() || !gathered.is_empty() {
            let id = *next_run;
            *next_run += 1;
            let path = run::path_of(&self.dir, id);
            let failed = "a run cannot be written";
            let written = write_run(&path, id, &mut manifest, merged, gathered, number);
            let facts = written.map_err(|error| {
                let _ = fs::remove_file(&path);
                io_error(&path, failed)(error)
            })?;
            manifest.runs.retain(|run| !old.contains(&run.id));
            if facts.entries() > 0 {
                let run = Run::open(&path, &facts).map_err(io_error(&path, "cannot be opened"))?;
                runs.push(Arc::new(run));
                manifest.runs.push(facts);
            }
        }
        manifest.next_run = *next_run;
        manifest.forget_unused();
        manifest.runs.sort_by_key(|run| Reverse(run.entries()));
        runs.sort_by_key(|run| {
            manifest.runs.iter().position(|facts| facts.id == run.id()).unwrap_or(usize::MAX)
        });
        write_manifest(&self.dir, &manifest)
            .map_err(io_error(&self.dir, "its list of runs cannot be replaced"))?;
        *locked(&self.current) = Snapshot { manifest: Arc::new(manifest), runs };
        step().map_err(io_error(&self.dir, "runs that were merged cannot be removed"))?;
        for id in old {
            // One that stays is removed when the index is opened next.
            let _ = fs::remove_file(run::path_of(&self.dir, id));
        }
        Ok(())
    }
}

/// The smaller runs with which one of `entries` is to be merged.
fn with_like_size(descending: &[Arc<Run>], entries: u64) -> Vec<Arc<Run>> {
    let at = descending.partition_point(|run| run.entries() >= entries);
    let mut sizes: Vec<u64> = descending.iter().map(|run| run.entries()).collect();
    sizes.insert(at, entries);
    let first = sizes.len() - merge::to_merge(&sizes);
    // The new one is among those that are merged, or none are: without it nothing was to be merged.
    if first > at { Vec::new() } else { descending[first..].to_vec() }
}

fn write_run(
    path: &Path,
    id: u64,
    manifest: &mut Manifest,
    merged: &[Arc<Run>],
    gathered: &[Run],
    number: u16,
) -> io::Result<super::RunFacts> {
    step()?;
    let numbered = merged.iter().map(|run| Input { run, image: None });
    let inputs: Vec<Input<'_>> =
        numbered.chain(gathered.iter().map(|run| Input { run, image: Some(number) })).collect();
    let dropped = manifest.dropped();
    let mut out = RunWriter::create(path, id)?;
    step()?;
    let damaged = merge::merge(&inputs, &dropped, &mut out)?;
    let (old, new): (Vec<usize>, Vec<usize>) =
        damaged.into_iter().partition(|input| *input < merged.len());
    if !new.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what was gathered is damaged"));
    }
    let lost = old.into_iter().map(|input| merged[input].id()).collect();
    manifest.lose(&lost);
    step()?;
    out.finish()
}

fn read_manifest(path: &Path) -> Result<Result<Manifest, ManifestError>, PlacesError> {
    let failed = io_error(path, "cannot be read");
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Ok(Manifest::default()));
        }
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Manifest::decode(&bytes))
}

fn write_manifest(dir: &Path, manifest: &Manifest) -> io::Result<()> {
    let folder = File::open(dir)?;
    step()?;
    // The name of a new run must be durable before it is named.
    folder.sync_all()?;
    let fresh = dir.join(MANIFEST_NEW);
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).open(&fresh)?;
    step()?;
    file.write_all(&manifest.encode())?;
    file.sync_all()?;
    step()?;
    fs::rename(&fresh, dir.join(MANIFEST))?;
    step()?;
    folder.sync_all()
}

/// Removes what the manifest does not name. Says which number is above those of all runs that were there.
fn remove_orphans(dir: &Path, manifest: &Manifest) -> Result<u64, PlacesError> {
    let failed = "the folder cannot be read";
    let mut above = 0;
    for entry in fs::read_dir(dir).map_err(io_error(dir, failed))? {
        let entry = entry.map_err(io_error(dir, failed))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let run = name.strip_prefix("run-").and_then(|id| u64::from_str_radix(id, 16).ok());
        if let Some(id) = run {
            above = above.max(id.saturating_add(1));
        }
        let named = run.is_some_and(|id| manifest.runs.iter().any(|run| run.id == id));
        let ours = run.is_some() || name.starts_with("build-") || name == MANIFEST_NEW;
        if ours && !named {
            let path = entry.path();
            fs::remove_file(&path).map_err(io_error(&path, "what a crash left stays"))?;
        }
    }
    Ok(above)
}

impl Manifest {
    /// Drops images, of which entries may be left. Whether there were any.
    fn drop_images(&mut self, gone: impl Fn(&Indexed) -> bool) -> bool {
        let mut any = false;
        for image in self.images.values_mut().filter(|image| !image.is_dropped()) {
            if gone(image) {
                image.path = PathBuf::new();
                any = true;
            }
        }
        any
    }

    fn dropped(&self) -> BTreeSet<u16> {
        let dropped = self.images.iter().filter(|(_, image)| image.is_dropped());
        dropped.map(|(number, _)| *number).collect()
    }

    /// Something of these runs is lost, and so of each image that they tell of.
    fn lose(&mut self, runs: &BTreeSet<u64>) {
        let lost = self.runs.iter().filter(|run| runs.contains(&run.id));
        for number in lost.flat_map(|run| run.images.keys()) {
            if let Some(image) = self.images.get_mut(number) {
                image.whole = false;
            }
        }
    }

    /// Forgets dropped images of which no entry is left: their numbers are free.
    fn forget_unused(&mut self) {
        let used: BTreeSet<u16> =
            self.runs.iter().flat_map(|run| run.images.keys()).copied().collect();
        self.images.retain(|number, image| !image.is_dropped() || used.contains(number));
    }

    pub(super) fn entries(&self) -> u64 {
        self.runs.iter().map(super::RunFacts::entries).sum()
    }

    pub(super) fn dropped_entries(&self) -> u64 {
        let dropped = self.dropped();
        let all = self.runs.iter().flat_map(|run| &run.images);
        all.filter(|(image, _)| dropped.contains(image)).map(|(_, entries)| entries).sum()
    }

    fn is_stale(&self) -> bool {
        self.dropped_entries() * STALE_SHARE > self.entries()
    }
}

impl Snapshot {
    /// Places where a piece or block with this key may be, at most [`MAX_PLACES`].
    pub fn lookup(&self, key: u64) -> Vec<Place> {
        let mut found = Vec::new();
        for run in &self.runs {
            run.lookup(key, &mut found);
        }
        let places = found.into_iter().map(|entry| entry.place());
        places.filter(|place| self.image(place.image).is_some()).take(MAX_PLACES).collect()
    }

    /// An image by its number; `None` if it was dropped.
    pub fn image(&self, number: u16) -> Option<&Indexed> {
        self.manifest.images.get(&number).filter(|image| !image.is_dropped())
    }

    /// All images by their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (u16, &Indexed)> + '_ {
        let kept = self.manifest.images.iter().filter(|(_, image)| !image.is_dropped());
        kept.map(|(number, image)| (*number, image))
    }

    /// All images, and how many entries each has.
    pub fn images(&self) -> impl Iterator<Item = (&Indexed, u64)> + '_ {
        self.numbered().map(|(number, image)| {
            let of_image = self.manifest.runs.iter().filter_map(move |run| run.images.get(&number));
            (image, of_image.sum())
        })
    }

    /// Whether it tells of no image.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// What there is of it.
    pub fn summary(&self) -> Summary {
        Summary {
            images: self.images().count() as u64,
            entries: self.manifest.entries(),
            dropped_entries: self.manifest.dropped_entries(),
            runs: self.runs.len() as u64,
            file_bytes: self.runs.iter().map(|run| run.file_bytes()).sum(),
            memory_bytes: self.runs.iter().map(|run| run.memory_bytes() as u64).sum(),
            damaged_runs: self.runs.iter().filter(|run| run.is_damaged()).count() as u64,
        }
    }
}

#[cfg(test)]
thread_local! {
    /// Steps that succeed before one fails as if the process had ended there.
    pub(super) static STEPS_LEFT: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
}

/// A point at which tests end a change half way.
fn step() -> io::Result<()> {
    #[cfg(test)]
    {
        let left = STEPS_LEFT.get();
        STEPS_LEFT.set(left.map(|left| left.saturating_sub(1)));
        if left == Some(0) {
            return Err(io::Error::other("the test ends it here"));
        }
    }
    Ok(())
}
