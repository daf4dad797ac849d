//! The receiving half: puts items in order, rebuilds and checks pages, feeds the hypervisor. One item
//! is rebuilt while the hypervisor takes in the one before.
//!
//! A batch that names blocks of the target's disks waits, if they do not hold what it proves, for its
//! pages in full, and everything behind it with it.
//!
//! Invariant: a page reaches the hypervisor only after its batch, rebuilt in full, had the hashes
//! that the source computed. The page store is a file without a name: what the source said last of
//! every page, to rebuild differences and repeats from. It costs disk and evictable cache, never a
//! second copy of the guest in memory, and it is gone with the process.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use longhaul_dedup::compress::{self, Packed};
use longhaul_dedup::pagebatch::{
    self, BlockAt, Limits, MAX_PAGES_PER_BATCH, PageAt, PageBatchError, PageRecord,
};
use longhaul_dedup::pagebatch::{Placed, RebuildError as NotProven};
use longhaul_dedup::pages::{PAGE_BYTES, Page};
use tokio::sync::{mpsc, oneshot, watch};

use super::super::error::MigrationError;
use super::super::message::{MAX_REGIONS, MemoryKind, ToSource};
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
    /// For what is asked for again.
    unproven: mpsc::Sender<ToSource>,
    /// The item whose named pages were asked for, and those once they are here.
    asked: Option<(u64, Option<Bytes>)>,
}

impl MemoryReceiver {
    /// A receiver with a page store in the folder `dir`, that reads blocks of those `disks` that it can
    /// and says to `unproven` what they do not hold.
    pub(in super::super) fn new(
        peer: &str,
        dir: &Path,
        disks: Vec<Option<PathBuf>>,
        unproven: mpsc::Sender<ToSource>,
    ) -> Result<Self, MigrationError> {
        let store = PageStore::new(dir, disks).map_err(|source| MigrationError::Io {
            doing: format!("making a page store in {}", dir.display()),
            source,
        })?;
        let (waiting, asked) = (BTreeMap::new(), None);
        Ok(Self { peer: peer.to_owned(), store, next: 0, waiting, unproven, asked })
    }

    /// Takes an item, in any order, and gives what can be applied to `ready`, in order.
    async fn take(
        &mut self,
        item: u64,
        kind: MemoryKind,
        body: Bytes,
        ready: &mpsc::Sender<Vec<MemoryEvent>>,
    ) -> Result<(), MigrationError> {
        let body = match kind {
            MemoryKind::Named { of } => {
                match &mut self.asked {
                    Some((asked, pages @ None)) if *asked == of => *pages = Some(body),
                    _ => return Err(self.bad(format!("nobody asked for the pages of item {of}"))),
                }
                Bytes::new()
            }
            _ => body,
        };
        if item < self.next
            || self.waiting.len() >= WAITING_ITEMS_MAX
            || self.waiting.insert(item, (kind, body)).is_some()
        {
            return Err(self.bad(format!("memory item {item} was not expected")));
        }
        while let Some((kind, body)) = self.waiting.remove(&self.next) {
            let is_asked = self.asked.as_ref().is_some_and(|(_, pages)| pages.is_none());
            let events =
                if is_asked { None } else { self.events(kind.clone(), body.clone()).await? };
            let Some(events) = events else {
                self.waiting.insert(self.next, (kind, body));
                return Ok(());
            };
            self.next += 1;
            // Who takes them has failed, and says why.
            if ready.send(events).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What the next item comes to; nothing if pages of it had to be asked for.
    async fn events(
        &mut self,
        kind: MemoryKind,
        body: Bytes,
    ) -> Result<Option<Vec<MemoryEvent>>, MigrationError> {
        Ok(Some(match kind {
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
            // What it brought is with the item that it is for.
            MemoryKind::Named { .. } => Vec::new(),
            MemoryKind::Pages => {
                let named = match self.asked.take() {
                    Some((_, Some(pages))) => Some(self.named(&pages)?),
                    _ => None,
                };
                let mut store = std::mem::take(&mut self.store);
                let rebuilding = tokio::task::spawn_blocking(move || {
                    let events = store.rebuild(&body, named);
                    (store, events)
                });
                let (store, events) = rebuilding.await.expect("rebuilding does not panic");
                self.store = store;
                match events {
                    Err(RebuildError::Unproven) => {
                        tracing::debug!(item = self.next, "named pages are asked for in full");
                        self.asked = Some((self.next, None));
                        // Who tells the source has failed, and says why.
                        let _ = self.unproven.send(ToSource::Unproven { item: self.next }).await;
                        return Ok(None);
                    }
                    events => events.map_err(|error| self.bad(error))?,
                }
            }
        }))
    }

    /// Pages that came in full.
    fn named(&self, body: &Bytes) -> Result<Vec<Page>, MigrationError> {
        let packed = Packed::decode(body).map_err(|error| self.bad(error))?;
        let pages = compress::decompress(&packed, MAX_PAGES_PER_BATCH * PAGE_BYTES);
        let pages = pages.map_err(|error| self.bad(error))?;
        let (pages, []) = pages.as_chunks::<PAGE_BYTES>() else {
            return Err(self.bad("half a page"));
        };
        Ok(pages.iter().map(Page::from).collect())
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
    /// Blocks that it names do not hold what they should.
    #[error("named blocks do not hold the pages")]
    Unproven,
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
    /// The images of the disks that can be read, and those that are open.
    disks: Vec<(Option<PathBuf>, Option<File>)>,
}

impl PageStore {
    fn new(dir: &Path, disks: Vec<Option<PathBuf>>) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("pages-{:016x}", rand::random::<u64>()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        fs::remove_file(&path)?;
        let disks = disks.into_iter().map(|path| (path, None)).collect();
        Ok(Self { file: Some(file), disks, ..Self::default() })
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

    /// Decodes a batch, rebuilds and proves every page of it, and takes them in. Pages that it names by
    /// blocks are `named`, if they came, else what the disks hold.
    fn rebuild(
        &mut self,
        body: &Bytes,
        named: Option<Vec<Page>>,
    ) -> Result<Vec<MemoryEvent>, RebuildError> {
        let limits = Limits { records: MAX_PAGES_PER_BATCH, region_pages: &self.pages };
        let batch = pagebatch::decode(body, &limits)?;
        let names_blocks =
            batch.records().iter().any(|record| matches!(record, PageRecord::Block { .. }));
        let may_ask = names_blocks && named.is_none();
        let mut disks = std::mem::take(&mut self.disks);
        let mut named = named.map(Vec::into_iter);
        let mut failed = None;
        let last = |at| match self.read(at) {
            Ok(page) => page,
            Err(error) => {
                failed = Some(error);
                None
            }
        };
        let proven = batch.rebuild(last, |at| match &mut named {
            Some(named) => named.next(),
            None => block(&mut disks, at),
        });
        self.disks = disks;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let proven = match proven {
            Err(NotProven::MissingBlock { .. } | NotProven::Mismatch) if may_ask => {
                return Err(RebuildError::Unproven);
            }
            proven => proven?,
        };
        let mut events = Vec::new();
        let mut run = Run::default();
        for placed in proven {
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

/// What a block of a disk holds now; nothing if that cannot be read.
fn block(disks: &mut [(Option<PathBuf>, Option<File>)], at: BlockAt) -> Option<Page> {
    let (path, open) = disks.get_mut(usize::from(at.disk))?;
    if open.is_none() {
        *open = Some(File::open(path.as_ref()?).ok()?);
    }
    let mut content = [0; PAGE_BYTES];
    let offset = at.block.checked_mul(PAGE_BYTES as u64)?;
    open.as_ref()?.read_exact_at(&mut content, offset).ok()?;
    Some(Page::from(&content))
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longhaul_dedup::blocks::scan;
    use longhaul_dedup::compress::{Compressor, Level};

    use super::super::super::staging::PageKey;
    use super::super::blocks::KnownBlocks;
    use super::super::code::PageCoder;
    use super::*;
    use crate::hypervisor::Region;

    const PAGES: usize = 16;

    fn noise() -> Vec<u8> {
        let mut bytes = vec![0; PAGES * PAGE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn packed(pages: &[Page]) -> Bytes {
        let all: Vec<u8> = pages.iter().flat_map(|page| *page.as_array()).collect();
        let mut body = Vec::new();
        Compressor::new().compress(Level::Zstd(1), all.into()).encode_into(&mut body);
        body.into()
    }

    /// A receiver with one disk, which holds `disk`; the first item, and what it names.
    async fn begun(
        dir: &Path,
        disk: &[u8],
    ) -> (MemoryReceiver, mpsc::Receiver<ToSource>, PageCoder) {
        fs::write(dir.join("disk.raw"), disk).unwrap();
        let layout = MemoryLayout {
            section_id: 1,
            regions: vec![Region { name: "ram".into(), bytes: (2 * PAGES * PAGE_BYTES) as u64 }],
        };
        let blocks = Arc::new(KnownBlocks::new(1 << 30));
        blocks.readable(vec![true]);
        blocks.note(0, &scan(&[(0, Bytes::from(noise()))]), &[]);
        let (unproven, asked) = mpsc::channel(4);
        let disks = vec![Some(dir.join("disk.raw"))];
        let mut receiver =
            MemoryReceiver::new("peer", &dir.join("store"), disks, unproven).unwrap();
        let (ready, _events) = mpsc::channel(4);
        receiver.take(0, MemoryKind::Layout(layout.clone()), Bytes::new(), &ready).await.unwrap();
        (receiver, asked, PageCoder::new(&layout, blocks))
    }

    /// Pages 3 to 7, which are blocks of the disk, and another one.
    fn item(coder: &mut PageCoder) -> (Bytes, Vec<Page>) {
        let page = |number: usize| {
            Bytes::from(noise()).slice(number * PAGE_BYTES..(number + 1) * PAGE_BYTES)
        };
        let mut pages: Vec<_> =
            (3..8).map(|number| (PageKey::new(0, number as u64), Some(page(number)))).collect();
        pages.push((PageKey::new(0, 1), Some(Bytes::from(vec![7; PAGE_BYTES]))));
        let coded = coder.code(pages, true);
        assert_eq!(coded.named.len(), 5);
        let level = Level::Zstd(1);
        let (records, hash) = (&coded.records, coded.content_hash);
        (pagebatch::encode(records, hash, &mut Compressor::new(), level), coded.named)
    }

    fn contents(events: Vec<MemoryEvent>) -> Vec<Bytes> {
        let content = |event| match event {
            MemoryEvent::Page { content, .. } => content,
            other => panic!("{other:?}"),
        };
        events.into_iter().map(content).collect()
    }

    #[tokio::test]
    async fn pages_are_taken_from_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (mut receiver, _asked, mut coder) = begun(dir.path(), &noise()).await;
        let (body, named) = item(&mut coder);
        assert!(body.len() < 300, "{}", body.len());
        let (ready, mut events) = mpsc::channel(4);
        receiver.take(1, MemoryKind::Pages, body, &ready).await.unwrap();
        let found = contents(events.recv().await.unwrap());
        assert!(found.iter().zip(&named).all(|(found, page)| found[..] == page.as_array()[..]));
        assert_eq!(found.len(), 6);
    }

    #[tokio::test]
    async fn a_disk_that_holds_something_else_costs_the_pages_in_full_and_their_order_stays() {
        let dir = tempfile::tempdir().unwrap();
        // Block 5 was written to.
        let mut disk = noise();
        disk[5 * PAGE_BYTES] ^= 1;
        let (mut receiver, mut asked, mut coder) = begun(dir.path(), &disk).await;
        let (body, named) = item(&mut coder);
        let (ready, mut events) = mpsc::channel(4);
        receiver.take(1, MemoryKind::Pages, body, &ready).await.unwrap();
        assert_eq!(asked.recv().await, Some(ToSource::Unproven { item: 1 }));
        // What is behind it waits, and so does what nobody asked for.
        receiver.take(2, MemoryKind::PagesDone, Bytes::new(), &ready).await.unwrap();
        assert!(events.try_recv().is_err());
        receiver.take(3, MemoryKind::Named { of: 1 }, packed(&named), &ready).await.unwrap();
        let found = contents(events.recv().await.unwrap());
        assert!(found.iter().zip(&named).all(|(found, page)| found[..] == page.as_array()[..]));
        assert!(matches!(events.recv().await.unwrap()[..], [MemoryEvent::PagesDone]));
        assert!(events.recv().await.unwrap().is_empty());
        let again = MemoryKind::Named { of: 1 };
        assert!(receiver.take(4, again, packed(&named), &ready).await.is_err());
    }

    #[tokio::test]
    async fn pages_that_are_wrong_again_end_the_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let (mut receiver, _asked, mut coder) = begun(dir.path(), &[]).await;
        let (body, mut named) = item(&mut coder);
        let (ready, _events) = mpsc::channel(4);
        receiver.take(1, MemoryKind::Pages, body, &ready).await.unwrap();
        named.swap(0, 1);
        let named = packed(&named);
        assert!(receiver.take(2, MemoryKind::Named { of: 1 }, named, &ready).await.is_err());
    }
}
