//! One run's file: written once from front to back, then only read.
//!
//! Invariant: [`RunWriter::finish`] returns when the file is durable, and nothing changes it afterwards. A
//! page that is damaged holds nothing; what else a file has is found all the same.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    MAX_PLACES,
    format::{self, Entry, FENCE_KEYS, MAX_RUN_ENTRIES, PAGE_BYTES, PAGE_ENTRIES, Page, RunFacts},
};

/// Pages that a merge reads at once from each of its runs: 64 KiB.
const READ_AHEAD_PAGES: u64 = 16;

/// Where run `id` of an index in `dir` lies.
pub(super) fn path_of(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("run-{id:016x}"))
}

/// Writes a run from entries that ascend.
pub(super) struct RunWriter {
    id: u64,
    file: BufWriter<File>,
    page: Vec<Entry>,
    /// The first key of each page.
    fence: Vec<u64>,
    entries: u64,
    images: BTreeMap<u16, u64>,
}

impl RunWriter {
    /// A run `id` in a file that is made, or emptied: only a crash can have left one.
    pub(super) fn create(path: &Path, id: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(path)?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        // The header's place; it is written when the number of entries is known.
        file.write_all(&[0; PAGE_BYTES])?;
        Ok(Self {
            id,
            file,
            page: Vec::with_capacity(PAGE_ENTRIES),
            fence: Vec::new(),
            entries: 0,
            images: BTreeMap::new(),
        })
    }

    /// Adds an entry that is not below the last one.
    pub(super) fn push(&mut self, entry: Entry) -> io::Result<()> {
        if self.entries == MAX_RUN_ENTRIES {
            return Err(io::Error::other("a run of this index takes no more entries"));
        }
        self.page.push(entry);
        self.entries += 1;
        *self.images.entry(entry.image()).or_default() += 1;
        if self.page.len() == PAGE_ENTRIES { self.write_page() } else { Ok(()) }
    }

    fn write_page(&mut self) -> io::Result<()> {
        let number = 1 + self.fence.len() as u64;
        self.fence.push(self.page[0].key);
        self.file.write_all(&format::encode_page(self.id, number, &self.page))?;
        self.page.clear();
        Ok(())
    }

    /// Completes the file and makes it durable, but for its name.
    pub(super) fn finish(mut self) -> io::Result<RunFacts> {
        if !self.page.is_empty() {
            self.write_page()?;
        }
        let first = 1 + self.fence.len() as u64;
        for (number, keys) in (first..).zip(self.fence.chunks(FENCE_KEYS)) {
            self.file.write_all(&format::encode_fence(self.id, number, keys))?;
        }
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.write_all_at(&format::encode_run_header(self.id, self.entries), 0)?;
        file.sync_all()?;
        Ok(RunFacts { id: self.id, images: self.images })
    }
}

/// A run that is looked into. Its file stays readable when its name is gone.
#[derive(Debug)]
pub(super) struct Run {
    id: u64,
    entries: u64,
    file: File,
    fence: Vec<u64>,
    /// Times that a page was found damaged.
    damaged: AtomicU64,
}

impl Run {
    /// Opens what the manifest calls `facts`. A fence that is damaged is made anew from the pages.
    pub(super) fn open(path: &Path, facts: &RunFacts) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut run = Self {
            id: facts.id,
            entries: facts.entries(),
            file,
            fence: Vec::new(),
            damaged: AtomicU64::new(0),
        };
        let bytes = format::file_pages(run.entries) * PAGE_BYTES as u64;
        if run.file.metadata()?.len() != bytes
            || format::decode_run_header(&run.page(0)?) != Some((run.id, run.entries))
        {
            run.damaged.store(1, Ordering::Relaxed);
        }
        match run.read_fence()? {
            Some(fence) => run.fence = fence,
            None => run.fence_from_pages()?,
        }
        Ok(run)
    }

    /// A page of the file; one that lies behind its end is all zeros, which no check matches.
    fn page(&self, number: u64) -> io::Result<Page> {
        let mut page = [0; PAGE_BYTES];
        match self.file.read_exact_at(&mut page, number * PAGE_BYTES as u64) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
            _ => Ok(page),
        }
    }

    fn read_fence(&self) -> io::Result<Option<Vec<u64>>> {
        let data = format::data_pages(self.entries);
        // As much as the file has, whatever the manifest says.
        let has = self.file.metadata()?.len() / PAGE_BYTES as u64;
        if has < format::file_pages(self.entries) {
            return Ok(None);
        }
        let mut fence = Vec::with_capacity(data as usize);
        let mut number = 1 + data;
        while (fence.len() as u64) < data {
            let count = (data as usize - fence.len()).min(FENCE_KEYS);
            let page = self.page(number)?;
            let Some(mut keys) = format::decode_fence(self.id, number, &page, count) else {
                return Ok(None);
            };
            fence.append(&mut keys);
            number += 1;
        }
        Ok(fence.is_sorted().then_some(fence))
    }

    fn fence_from_pages(&mut self) -> io::Result<()> {
        self.damaged.store(1, Ordering::Relaxed);
        let has = self.file.metadata()?.len() / PAGE_BYTES as u64;
        let mut last = 0;
        for index in 0..format::data_pages(self.entries).min(has.saturating_sub(1)) {
            let page = self.page(1 + index)?;
            let count = format::entries_in(self.entries, index);
            let first = format::decode_page(self.id, 1 + index, &page, count)
                .and_then(|mut entries| entries.next());
            // A damaged page is passed by whoever looks beside it.
            last = first.map_or(last, |entry| entry.key);
            self.fence.push(last);
        }
        Ok(())
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Memory that its fence takes, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.fence.capacity() * 8
    }

    /// Bytes of its file.
    pub(super) fn file_bytes(&self) -> u64 {
        format::file_pages(self.entries) * PAGE_BYTES as u64
    }

    /// Whether anything of it was found damaged since it was opened.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed) > 0
    }

    /// Appends the entries with this key, at most [`MAX_PLACES`] of them.
    pub(super) fn lookup(&self, key: u64, found: &mut Vec<Entry>) {
        // The last page that begins below the key, and those that begin with it.
        let begin = self.fence.partition_point(|first| *first < key).saturating_sub(1);
        let enough = found.len() + MAX_PLACES;
        for index in begin..self.fence.len() {
            if self.fence[index] > key || found.len() >= enough {
                return;
            }
            let number = 1 + index as u64;
            let count = format::entries_in(self.entries, index as u64);
            // What cannot be read is not found.
            let page = self.page(number).unwrap_or([0; PAGE_BYTES]);
            let Some(entries) = format::decode_page(self.id, number, &page, count) else {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let of_key = entries.skip_while(|entry| entry.key < key);
            let room = enough - found.len();
            found.extend(of_key.take_while(|entry| entry.key == key).take(room));
        }
    }

    /// All its entries in order, those of damaged pages left out.
    pub(super) fn reader(&self) -> RunReader<'_> {
        RunReader { run: self, next_page: 0, ready: Vec::new().into_iter(), damaged: 0 }
    }
}

/// Reads a run from front to back.
pub(super) struct RunReader<'a> {
    run: &'a Run,
    next_page: u64,
    ready: std::vec::IntoIter<Entry>,
    damaged: u64,
}

impl RunReader<'_> {
    /// Pages that were left out so far.
    pub(super) fn damaged(&self) -> u64 {
        self.damaged
    }

    /// The next entry.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.ready.next() {
                return Ok(Some(entry));
            }
            let left = format::data_pages(self.run.entries) - self.next_page;
            if left == 0 {
                return Ok(None);
            }
            self.fill(left.min(READ_AHEAD_PAGES))?;
        }
    }

    fn fill(&mut self, pages: u64) -> io::Result<()> {
        let run = self.run;
        let mut bytes = vec![0; pages as usize * PAGE_BYTES];
        let mut done = 0;
        while done < bytes.len() {
            let at = (1 + self.next_page) * PAGE_BYTES as u64 + done as u64;
            match run.file.read_at(&mut bytes[done..], at) {
                Ok(0) => break,
                Ok(some) => done += some,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let mut entries = Vec::with_capacity(pages as usize * PAGE_ENTRIES);
        let (content, _) = bytes.as_chunks::<PAGE_BYTES>();
        for (index, page) in (self.next_page..).zip(content) {
            let count = format::entries_in(run.entries, index);
            match format::decode_page(run.id, 1 + index, page, count) {
                Some(some) => entries.extend(some),
                None => self.damaged += 1,
            }
        }
        self.next_page += pages;
        self.ready = entries.into_iter();
        Ok(())
    }
}
