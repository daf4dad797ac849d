//! The recipe's file: appended to, synced, compacted, one writer at a time.
//!
//! Invariant: the file always begins with a valid log. Appends go behind the last good record, a
//! failed one leaves bytes that no reader takes for a record, and files are replaced only by
//! complete and synced ones.
//!
//! Order of writes, which the caller keeps: before a range with known pieces is overwritten,
//! [`void`](RecipeLog::void) it and [`sync`](RecipeLog::sync); [`append`](RecipeLog::append) after
//! the image has the bytes; sync the image before [`mark_complete`](RecipeLog::mark_complete).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, BufWriter, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    Completed, GrainSample, HeaderError, ImageIdentity, MAX_GRAINS, MAX_RECIPE_ENTRIES, ReadError,
    Recipe, RecipeEntry, Sample,
    format::{self, MAX_RECORD_ITEMS, Record},
};

/// Logs with fewer items than this are not worth rewriting: 45 KiB.
const COMPACT_FROM_ITEMS: u64 = 1024;

/// A recipe's file that could not be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file system refused.
    #[error("recipe {path}: {doing}")]
    Io {
        /// The recipe's file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file is not a recipe that this release reads. It was left as it is.
    #[error("recipe {path}: {reason}: remove the file to start anew")]
    Unreadable {
        /// The recipe's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: HeaderError,
    },
    /// More than a recipe may list.
    #[error("recipe {path}: more than {MAX_RECIPE_ENTRIES} pieces")]
    TooManyEntries {
        /// The recipe's file.
        path: PathBuf,
    },
    /// A piece or range that is empty, too long or not in the image. Nothing was written.
    #[error("recipe {path}: bytes {start}..{end} are no piece or range of this image")]
    OutsideImage {
        /// The recipe's file.
        path: PathBuf,
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
    },
}

/// A recipe and the file that keeps it.
#[derive(Debug)]
pub struct RecipeLog {
    path: PathBuf,
    file: File,
    recipe: Recipe,
    cut_bytes: u64,
    /// The last write failed and may have left bytes behind the log.
    torn: bool,
}

impl RecipeLog {
    /// Where the recipe of an image lies: beside it, with `.longhaul-recipe` appended to its name.
    pub fn path_for(image: &Path) -> PathBuf {
        let mut path = image.as_os_str().to_owned();
        path.push(".longhaul-recipe");
        path.into()
    }

    /// Makes an empty recipe for an image of `image_bytes` bytes, in place of one that is there.
    pub fn create(path: &Path, image_bytes: u64) -> Result<Self, RecipeError> {
        let recipe = Recipe::empty(image_bytes);
        let file = replace(path, |file| file.write_all(&format::encode_header(image_bytes)))?;
        Ok(Self { path: path.to_owned(), file, recipe, cut_bytes: 0, torn: false })
    }

    /// Opens a recipe to append to it. What follows its last good record is cut off.
    pub fn open(path: &Path) -> Result<Self, RecipeError> {
        let io_error = io_error(path, "cannot be opened");
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error)?;
        let recipe = read(path, &file)?;
        let bytes = file.metadata().map_err(self::io_error(path, "cannot be examined"))?.len();
        let cut_bytes = bytes.saturating_sub(recipe.log_bytes);
        if cut_bytes > 0 {
            file.set_len(recipe.log_bytes)
                .and_then(|()| file.sync_all())
                .map_err(self::io_error(path, "its damaged end cannot be cut off"))?;
        }
        Ok(Self { path: path.to_owned(), file, recipe, cut_bytes, torn: false })
    }

    /// Reads a recipe that somebody else may be appending to; the file is not touched.
    pub fn load(path: &Path) -> Result<Recipe, RecipeError> {
        let file = File::open(path).map_err(io_error(path, "cannot be opened"))?;
        read(path, &file)
    }

    /// The recipe's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Bytes that [`open`](Self::open) cut off: 0 unless a crash or damage left some.
    pub fn cut_bytes(&self) -> u64 {
        self.cut_bytes
    }

    /// The mark, if nothing was appended after it.
    pub fn complete(&self) -> Option<Completed> {
        self.recipe.complete()
    }

    /// Records pieces that the image now holds. They supersede whatever overlaps them.
    pub fn append(&mut self, entries: &[RecipeEntry]) -> Result<(), RecipeError> {
        self.write(records(entries.iter().copied(), Record::Entries).collect())
    }

    /// Records blocks that belong into the index, behind the pieces that they are of.
    pub fn append_samples(&mut self, samples: &[Sample]) -> Result<(), RecipeError> {
        self.write(records(samples.iter().copied(), Record::Samples).collect())
    }

    /// Records samples of grains that lie in what was written. They are let go where there are too
    /// many already: what is not recorded is not found similar, and no more.
    pub fn append_grains(&mut self, grains: &[GrainSample]) -> Result<(), RecipeError> {
        let room = MAX_GRAINS.saturating_sub(self.recipe.grains.len());
        let kept = grains.iter().copied().take(room);
        self.write(records(kept, Record::Grains).collect())
    }

    /// Records that these parts of the image are zeros now.
    pub fn append_zeros(
        &mut self,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), RecipeError> {
        self.write(records(ranges.into_iter(), Record::Zeros).collect())
    }

    /// Records that nothing is known any more of these parts of the image.
    pub fn void(
        &mut self,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), RecipeError> {
        self.write(records(ranges.into_iter(), Record::Void).collect())
    }

    /// Returns once everything appended is durable. Rewrites the file first if more than half of
    /// it was superseded.
    pub fn sync(&mut self) -> Result<(), RecipeError> {
        let live = self.recipe.items() as u64;
        if self.recipe.logged > (2 * live).max(COMPACT_FROM_ITEMS) {
            return self.compact();
        }
        self.file.sync_data().map_err(io_error(&self.path, "cannot be synced"))
    }

    /// Marks that the image, being `image`, holds exactly what is listed, durably. Any later
    /// append ends this. The image must have been synced.
    pub fn mark_complete(
        &mut self,
        generation: u64,
        image: ImageIdentity,
    ) -> Result<(), RecipeError> {
        // What it vouches for must not be less durable than the mark.
        self.sync()?;
        self.write(vec![Record::Complete(Completed { generation, image })])?;
        self.file.sync_data().map_err(io_error(&self.path, "cannot be synced"))
    }

    /// Rewrites the file with nothing superseded in it, durably.
    pub fn compact(&mut self) -> Result<(), RecipeError> {
        let recipe = &self.recipe;
        let mut log_bytes = 0;
        self.file = replace(&self.path, |file| {
            let mut put = |bytes: &[u8]| {
                log_bytes += bytes.len() as u64;
                file.write_all(bytes).map(|()| log_bytes)
            };
            let mut at = put(&format::encode_header(recipe.image_bytes))?;
            // Samples last: what is recorded of their blocks before does not drop them.
            let records = records(recipe.entries(), Record::Entries)
                .chain(records(recipe.zeros(), Record::Zeros))
                .chain(records(recipe.samples(), Record::Samples))
                .chain(records(recipe.grains(), Record::Grains));
            for record in records {
                at = put(&format::encode_record(at, &record))?;
            }
            if let Some(completed) = recipe.complete {
                put(&format::encode_record(at, &Record::Complete(completed)))?;
            }
            Ok(())
        })?;
        self.recipe.logged = self.recipe.items() as u64;
        self.recipe.log_bytes = log_bytes;
        self.torn = false;
        Ok(())
    }

    /// Appends all records, or changes nothing but what a reader may find behind the log.
    fn write(&mut self, records: Vec<Record>) -> Result<(), RecipeError> {
        let mut at = self.recipe.log_bytes;
        let mut bytes = Vec::new();
        let mut lens = Vec::with_capacity(records.len());
        let mut items = 0;
        for record in &records {
            if !self.recipe.admits(record) {
                return Err(self.outside_image(record));
            }
            items += match record {
                Record::Entries(part) => part.len(),
                Record::Zeros(part) | Record::Void(part) => part.len(),
                Record::Samples(part) => part.len(),
                Record::Grains(part) => part.len(),
                Record::Complete(_) => 0,
            };
            let record_bytes = format::encode_record(at, record);
            at += record_bytes.len() as u64;
            lens.push(record_bytes.len() as u64);
            bytes.extend_from_slice(&record_bytes);
        }
        if self.recipe.items() + items > MAX_RECIPE_ENTRIES {
            return Err(RecipeError::TooManyEntries { path: self.path.clone() });
        }
        // Whole records of a failed append must not come to stand behind the next one's.
        if self.torn {
            self.file
                .set_len(self.recipe.log_bytes)
                .map_err(io_error(&self.path, "the rest of a failed write cannot be cut off"))?;
        }
        self.torn = true;
        self.file
            .write_all_at(&bytes, self.recipe.log_bytes)
            .map_err(io_error(&self.path, "cannot be written"))?;
        self.torn = false;
        for (record, len) in records.iter().zip(lens) {
            self.recipe.apply(record, len);
        }
        Ok(())
    }

    fn outside_image(&self, record: &Record) -> RecipeError {
        let bad = match record {
            Record::Entries(entries) => entries
                .iter()
                .find(|entry| entry.range().is_none_or(|range| range.end > self.recipe.image_bytes))
                .map(|entry| entry.offset..entry.offset.saturating_add(u64::from(entry.len))),
            Record::Samples(samples) => samples
                .iter()
                .find(|sample| sample.offset >= self.recipe.image_bytes)
                .map(|sample| sample.offset..sample.offset.saturating_add(1)),
            Record::Grains(grains) => grains
                .iter()
                .find(|grain| grain.offset >= self.recipe.image_bytes)
                .map(|grain| grain.offset..grain.offset.saturating_add(1)),
            Record::Void(ranges) | Record::Zeros(ranges) => ranges
                .iter()
                .find(|range| range.start >= range.end || range.end > self.recipe.image_bytes)
                .cloned(),
            Record::Complete(_) => None,
        };
        let Range { start, end } = bad.unwrap_or_default();
        RecipeError::OutsideImage { path: self.path.clone(), start, end }
    }
}

/// Items in as many records as they need.
fn records<T>(
    mut items: impl Iterator<Item = T>,
    record: impl Fn(Vec<T>) -> Record,
) -> impl Iterator<Item = Record> {
    std::iter::from_fn(move || {
        let part: Vec<T> = items.by_ref().take(MAX_RECORD_ITEMS).collect();
        (!part.is_empty()).then(|| record(part))
    })
}

fn read(path: &Path, file: &File) -> Result<Recipe, RecipeError> {
    Recipe::read(BufReader::with_capacity(1 << 20, file)).map_err(|error| match error {
        ReadError::Io(source) => io_error(path, "cannot be read")(source),
        ReadError::Header(reason) => RecipeError::Unreadable { path: path.to_owned(), reason },
        ReadError::TooManyEntries => RecipeError::TooManyEntries { path: path.to_owned() },
    })
}

/// Puts a file with this content in place of `path`: after a crash the old or the new one is there.
fn replace(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<File, RecipeError> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(&fresh).map_err(io_error(path, "cannot be created"))?;
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    content(&mut writer)
        .and_then(|()| writer.into_inner().map_err(io::IntoInnerError::into_error))
        .and_then(|file| {
            file.sync_all()?;
            fs::rename(&fresh, path)?;
            File::open(parent)?.sync_all()?;
            Ok(file)
        })
        .map_err(io_error(path, "cannot be created"))
}

fn io_error(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> RecipeError {
    let path = path.to_owned();
    move |source| RecipeError::Io { path, doing, source }
}
