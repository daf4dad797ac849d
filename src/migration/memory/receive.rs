//! The receiving half: puts items in order, rebuilds and checks pages, feeds the hypervisor. One item
//! is rebuilt while the hypervisor takes in the one before.
//!
//! Invariant: a page reaches the hypervisor only after its batch, rebuilt in full, had the hashes
//! that the source computed. The page store is a file without a name: what the source said last of
//! every page, to rebuild differences and repeats from. It costs disk and evictable cache, never a
//! second copy of the guest in memory, and it is gone with the process.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use longhaul_dedup::compress::{self, Packed};
use longhaul_dedup::pagebatch::{self, Limits, MAX_PAGES_PER_BATCH, PageAt, PageBatchError};
use longhaul_dedup::pagebatch::{Placed, RebuildError as NotProven};
use longhaul_dedup::pages::{PAGE_BYTES, Page};
use tokio::sync::{mpsc, oneshot, watch};

use super::super::error::MigrationError;
use super::super::message::{MAX_REGIONS, MemoryKind};
use crate::hypervisor::{MemoryEvent, MemoryLayout, MemorySink};

/// Items that may wait for an earlier one. The sender keeps one path's content under way, in items
/// of about a megabyte or less; the transport bounds their memory.
const WAITING_ITEMS_MAX: usize = 4096;
/// The largest opaque item that is unpacked.
const OPAQUE_BYTES_MAX: usize = 4 << 20;
/// Items that are rebuilt and not yet with the hypervisor.
const REBUILT_ITEMS_MAX: usize = 2;
/// Neighbouring pages that are written to the page store as one.
const RUN_BYTES_MAX: usize = 1 << 20;
/// The largest guest that is accepted, as at the source.
const GUEST_BYTES_MAX: u64 = 4 << 40;

/// What the memory task is told.
pub(in super::super) enum MemoryWork {
    Item(u64, MemoryKind, Bytes),
    Finish(oneshot::Sender<Result<(), MigrationError>>),
}

/// Receives the memory of one attempt until it is told to finish; `applied` counts the items that the
/// hypervisor has.
pub(in super::super) async fn receive(
    mut memory: MemoryReceiver,
    mut sink: Box<dyn MemorySink>,
    mut work: mpsc::Receiver<MemoryWork>,
    applied: watch::Sender<u64>,
) -> Result<(), MigrationError> {
    let (ready, mut rebuilt) = mpsc::channel(REBUILT_ITEMS_MAX);
    let rebuilding = async move {
        while let Some(work) = work.recv().await {
            match work {
                MemoryWork::Item(item, kind, body) => memory.take(item, kind, body, &ready).await?,
                MemoryWork::Finish(done) => return Ok(Some(done)),
            }
        }
        Ok(None)
    };
    let feeding = async {
        while let Some(events) = rebuilt.recv().await {
            sink.apply(events).await?;
            applied.send_modify(|items| *items += 1);
        }
        Ok::<_, MigrationError>(())
    };
    let (done, ()) = tokio::try_join!(rebuilding, feeding)?;
    if let Some(done) = done {
        let _ = done.send(sink.finish().await.map_err(MigrationError::from));
    }
    Ok(())
}

/// Puts items in order and makes of each what the hypervisor is to get.
pub(in super::super) struct MemoryReceiver {
    peer: String,
    store: PageStore,
    next: u64,
    waiting: BTreeMap<u64, (MemoryKind, Bytes)>,
}

impl MemoryReceiver {
    /// A receiver with a page store in the folder `dir`.
    pub(in super::super) fn new(peer: &str, dir: &Path) -> Result<Self, MigrationError> {
        let store = PageStore::new(dir).map_err(|source| MigrationError::Io {
            doing: format!("making a page store in {}", dir.display()),
            source,
        })?;
        Ok(Self { peer: peer.to_owned(), store, next: 0, waiting: BTreeMap::new() })
    }

    /// Takes an item, in any order, and gives what can be applied to `ready`, in order.
    async fn take(
        &mut self,
        item: u64,
        kind: MemoryKind,
        body: Bytes,
        ready: &mpsc::Sender<Vec<MemoryEvent>>,
    ) -> Result<(), MigrationError> {
        if item < self.next
            || self.waiting.len() >= WAITING_ITEMS_MAX
            || self.waiting.insert(item, (kind, body)).is_some()
        {
            return Err(self.bad(format!("memory item {item} was not expected")));
        }
        while let Some((kind, body)) = self.waiting.remove(&self.next) {
            let events = self.events(kind, body).await?;
            self.next += 1;
            // Who takes them has failed, and says why.
            if ready.send(events).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn events(
        &mut self,
        kind: MemoryKind,
        body: Bytes,
    ) -> Result<Vec<MemoryEvent>, MigrationError> {
        Ok(match kind {
            MemoryKind::Layout(layout) => {
                self.store.lay_out(&layout).map_err(|detail| self.bad(detail))?;
                vec![MemoryEvent::Layout(layout)]
            }
            MemoryKind::Opaque => {
                let packed = Packed::decode(&body).map_err(|error| self.bad(error))?;
                let bytes = compress::decompress(&packed, OPAQUE_BYTES_MAX)
                    .map_err(|error| self.bad(error))?;
                vec![MemoryEvent::Opaque(bytes)]
            }
            MemoryKind::LastPass => vec![MemoryEvent::LastPass],
            MemoryKind::PagesDone => vec![MemoryEvent::PagesDone],
            MemoryKind::NotUnderstood { reason } => vec![MemoryEvent::NotUnderstood { reason }],
            MemoryKind::Pages => {
                let mut store = std::mem::take(&mut self.store);
                let rebuilding = tokio::task::spawn_blocking(move || {
                    let events = store.rebuild(&body);
                    (store, events)
                });
                let (store, events) = rebuilding.await.expect("rebuilding does not panic");
                self.store = store;
                events.map_err(|error| self.bad(error))?
            }
        })
    }

    fn bad(&self, detail: impl ToString) -> MigrationError {
        MigrationError::protocol(&self.peer, detail)
    }
}

/// Why a batch was not rebuilt.
#[derive(Debug, thiserror::Error)]
enum RebuildError {
    #[error(transparent)]
    Malformed(#[from] PageBatchError),
    #[error(transparent)]
    NotProven(#[from] NotProven),
    #[error("the page store failed: {0}")]
    Store(#[from] io::Error),
}

/// What the page store has of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    Zero,
    Content,
}

/// What the source said last of every page.
#[derive(Debug, Default)]
struct PageStore {
    file: Option<File>,
    /// For each region: its first byte in the file.
    starts: Vec<u64>,
    /// For each region: its pages.
    pages: Vec<u64>,
    /// What the file has of each page of each region.
    held: Vec<Vec<Held>>,
}

impl PageStore {
    fn new(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("pages-{:016x}", rand::random::<u64>()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(Self { file: Some(file), ..Self::default() })
    }

    fn lay_out(&mut self, layout: &MemoryLayout) -> Result<(), &'static str> {
        let mut start = 0_u64;
        if layout.regions.len() > MAX_REGIONS || !self.starts.is_empty() {
            return Err("a memory layout beyond every bound");
        }
        for region in &layout.regions {
            let pages = region.bytes.div_ceil(PAGE_BYTES as u64);
            let end = pages.checked_mul(PAGE_BYTES as u64).and_then(|len| start.checked_add(len));
            let end = end.filter(|&end| end <= GUEST_BYTES_MAX);
            let end = end.ok_or("a memory layout beyond every bound")?;
            self.starts.push(start);
            self.pages.push(pages);
            self.held.push(vec![Held::Nothing; pages as usize]);
            start = end;
        }
        Ok(())
    }

    /// Decodes a batch, rebuilds and proves every page of it, and takes them in.
    fn rebuild(&mut self, body: &Bytes) -> Result<Vec<MemoryEvent>, RebuildError> {
        let limits = Limits { records: MAX_PAGES_PER_BATCH, region_pages: &self.pages };
        let batch = pagebatch::decode(body, &limits)?;
        let mut failed = None;
        let proven = batch.rebuild(|at| match self.read(at) {
            Ok(page) => page,
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        let mut events = Vec::new();
        let mut run = Run::default();
        for placed in proven? {
            match placed {
                Placed::Zero { at, count } => {
                    for page in at.page..at.page + u64::from(count) {
                        self.held[usize::from(at.region)][page as usize] = Held::Zero;
                        events.push(MemoryEvent::Zero { region: at.region, page });
                    }
                }
                Placed::Page { at, content, .. } => {
                    run.add(self.file()?, self.offset(at), &content)?;
                    self.held[usize::from(at.region)][at.page as usize] = Held::Content;
                    let content = content.into_bytes();
                    events.push(MemoryEvent::Page { region: at.region, page: at.page, content });
                }
            }
        }
        run.write(self.file()?)?;
        Ok(events)
    }

    /// What the source said last of a page that is within the layout.
    fn read(&self, at: PageAt) -> io::Result<Option<Page>> {
        let held = self.held.get(usize::from(at.region)).and_then(|pages| {
            // A page beyond the region is held like any other that was never sent: not.
            pages.get(usize::try_from(at.page).ok()?)
        });
        match held {
            None | Some(Held::Nothing) => Ok(None),
            Some(Held::Zero) => Ok(Some(Page::zero())),
            Some(Held::Content) => {
                let mut content = [0; PAGE_BYTES];
                self.file()?.read_exact_at(&mut content, self.offset(at))?;
                Ok(Some(Page::from(&content)))
            }
        }
    }

    fn offset(&self, at: PageAt) -> u64 {
        self.starts[usize::from(at.region)] + at.page * PAGE_BYTES as u64
    }

    fn file(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::Error::other("the page store is gone"))
    }
}

/// Pages that follow each other, to be written as one.
#[derive(Default)]
struct Run {
    start: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn add(&mut self, file: &File, offset: u64, page: &Page) -> io::Result<()> {
        if offset != self.start + self.bytes.len() as u64 || self.bytes.len() >= RUN_BYTES_MAX {
            self.write(file)?;
            self.start = offset;
        }
        self.bytes.extend_from_slice(page.as_array());
        Ok(())
    }

    fn write(&mut self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.bytes, self.start)?;
        self.bytes.clear();
        Ok(())
    }
}
