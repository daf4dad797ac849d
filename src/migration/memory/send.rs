//! The sending half: takes pages from the staging area, codes them, and keeps the link just full.
//!
//! Invariant: items go out in the order in which the target must apply them, and no more is under
//! way than the path holds: what is still in the staging area can be superseded, what is with QUIC
//! cannot. Pages that went as names of blocks are kept until the target has them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use longhaul_dedup::compress::{Compressor, Level};
use longhaul_dedup::pagebatch::{self, MAX_PAGES_PER_BATCH};
use longhaul_dedup::pages::{PAGE_BYTES, Page};
use longhaul_transport::Class;

use super::super::coding::Coding;
use super::super::error::MigrationError;
use super::super::link::Link;
use super::super::message::{BulkHeader, MemoryKind};
use super::super::meter::Meter;
use super::super::report::Saved;
use super::super::staging::StagedPage;
use super::blocks::KnownBlocks;
use super::code::{Coded, PageCoder};
use super::pump::{Stage, Waiting};

/// Content in a batch: the more, the better pages compress together; the less, the sooner the first
/// is there. 1 MiB takes 40 ms on 200 Mbit/s uncompressed; 4 MiB gained nothing on a Debian guest.
const BATCH_BYTES: usize = 1 << 20;
/// Opaque bytes in an item.
const OPAQUE_BYTES: usize = 1 << 20;
/// What may be under way on any path.
const WINDOW_BYTES_MIN: u64 = 512 << 10;
/// And at most, whatever the path seems to hold.
const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Pages that went as names, at most, and are kept: a path of 100 ms takes 640 MiB of them a second.
const NAMED_PAGES_MAX: usize = 16384;

/// About what a page takes that goes as a name.
const NAME_BYTES: u64 = 12;
/// Pages over which their ratio is measured.
const RATIO_OVER_BYTES: u64 = 8 << 20;

/// Sends memory items.
pub(in super::super) struct MemorySender<'a> {
    link: &'a Link,
    meter: &'a Meter,
    coding: &'a Coding,
    coder: Option<PageCoder>,
    under_way: VecDeque<UnderWay>,
    blocks: Arc<KnownBlocks>,
    /// How much of the window is in use, 0 to 1.
    fill: f32,
    ratio: Ratio,
}

/// Coded bytes for a byte of page, lately, of pages that are not zeros and did not go as names: in the end
/// none do.
#[derive(Debug, Clone, Copy)]
struct Ratio(Option<f64>);

impl Ratio {
    /// Takes in a batch: bytes of its pages, and what they came to.
    fn observe(&mut self, page_bytes: u64, coded_bytes: u64) {
        if page_bytes > 0 {
            let now = coded_bytes as f64 / page_bytes as f64;
            let weight = page_bytes as f64 / (page_bytes + RATIO_OVER_BYTES) as f64;
            let before = self.0.unwrap_or(now);
            self.0 = Some(before + weight * (now - before));
        }
    }

    fn get(self) -> f64 {
        self.0.unwrap_or(1.0)
    }
}

/// An item that the target has not applied yet, as far as is known.
struct UnderWay {
    item: u64,
    bytes: u64,
    /// Pages that went as names of blocks.
    named: Vec<Page>,
}

/// What is known about the sending, for the decision when to switch over.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct SendState {
    /// Coded bytes sent and not yet applied.
    pub(in super::super) unapplied_bytes: u64,
    /// Coded bytes for a byte of page that is not zero and goes in full, lately.
    pub(in super::super) wire_per_page_byte: f64,
}

impl<'a> MemorySender<'a> {
    pub(in super::super) fn new(
        link: &'a Link,
        meter: &'a Meter,
        coding: &'a Coding,
        blocks: Arc<KnownBlocks>,
    ) -> Self {
        Self {
            link,
            meter,
            coding,
            coder: None,
            under_way: VecDeque::new(),
            blocks,
            fill: 0.0,
            ratio: Ratio(None),
        }
    }

    /// Sends until the stream's end was sent. `state` is kept up to date on the way.
    pub(in super::super) async fn run(
        mut self,
        stage: &Stage,
        state: &tokio::sync::watch::Sender<SendState>,
    ) -> Result<(), MigrationError> {
        loop {
            self.make_room(state).await?;
            match next_work(stage) {
                Work::Nothing => tokio::select! {
                    () = stage.filled.notified() => {}
                    item = self.link.unproven() => self.send_named(item).await?,
                },
                Work::Pages(pages) => {
                    stage.drained.notify_one();
                    // Towards the end nothing may have to be asked for again.
                    let names = !stage.first_pass_done();
                    self.send_pages(pages, names).await?;
                }
                Work::Item(Waiting::End) => return self.until_proven().await,
                Work::Item(item) => {
                    stage.drained.notify_one();
                    self.send_waiting(item).await?;
                }
            }
        }
    }

    /// Waits until what is under way fits the path.
    async fn make_room(
        &mut self,
        state: &tokio::sync::watch::Sender<SendState>,
    ) -> Result<(), MigrationError> {
        loop {
            let applied = self.forget_applied();
            let unapplied: u64 = self.under_way.iter().map(|item| item.bytes).sum();
            state.send_replace(SendState {
                unapplied_bytes: unapplied,
                wire_per_page_byte: self.ratio.get(),
            });
            let window =
                (self.link.stats().holds() * 3 / 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
            self.fill = (unapplied as f64 / window as f64).min(1.0) as f32;
            if unapplied < window && self.named_pages() < NAMED_PAGES_MAX {
                return Ok(());
            }
            self.until_more_applied(applied).await?;
        }
    }

    /// Lets go of what the target has applied. Returns how many items those are.
    fn forget_applied(&mut self) -> u64 {
        let applied = self.link.applied().memory_items;
        while self.under_way.front().is_some_and(|front| front.item < applied) {
            self.under_way.pop_front();
        }
        applied
    }

    fn named_pages(&self) -> usize {
        self.under_way.iter().map(|item| item.named.len()).sum()
    }

    /// Waits until the target has every page that went as a name.
    async fn until_proven(&mut self) -> Result<(), MigrationError> {
        loop {
            let applied = self.forget_applied();
            if self.named_pages() == 0 {
                return Ok(());
            }
            self.until_more_applied(applied).await?;
        }
    }

    /// Waits until more is applied, or sends what that waits for.
    async fn until_more_applied(&mut self, applied: u64) -> Result<(), MigrationError> {
        tokio::select! {
            more = self.link.until(|now| now.memory_items > applied) => more.map(drop),
            item = self.link.unproven() => self.send_named(item).await,
        }
    }

    /// Sends the pages in full that an item named.
    async fn send_named(&mut self, item: u64) -> Result<(), MigrationError> {
        let found = self.under_way.iter().find(|sent| sent.item == item);
        let Some(sent) = found.filter(|sent| !sent.named.is_empty()) else {
            let detail = format!("it wants the named pages of item {item}, which has none");
            return Err(MigrationError::protocol(self.link.peer(), detail));
        };
        tracing::debug!(item, pages = sent.named.len(), "blocks did not hold what was thought");
        self.blocks.was_wrong();
        let mut pages = Vec::with_capacity(sent.named.len() * PAGE_BYTES);
        sent.named.iter().for_each(|page| pages.extend_from_slice(page.as_array()));
        let mut packed = Vec::new();
        Compressor::new().compress(Level::default(), pages.into()).encode_into(&mut packed);
        self.send_item(Class::Pages, MemoryKind::Named { of: item }, packed.into()).await
    }

    async fn send_pages(
        &mut self,
        pages: Vec<StagedPage>,
        names: bool,
    ) -> Result<(), MigrationError> {
        let peer = self.link.peer();
        let mut coder = self
            .coder
            .take()
            .ok_or_else(|| MigrationError::protocol(peer, "pages came before their layout"))?;
        let nonzero = pages.iter().filter(|(_, content)| content.is_some()).count() as u64;
        let level = self.coding.page_level(self.link.bytes_per_s(), self.fill);
        let coding = tokio::task::spawn_blocking(move || {
            let coded = coder.code(pages, names);
            let began = Instant::now();
            let mut compressor = Compressor::new();
            let body =
                pagebatch::encode(&coded.records, coded.content_hash, &mut compressor, level);
            (coder, coded, body, began.elapsed())
        });
        let (coder, coded, body, busy) = coding.await.expect("coding does not panic");
        self.coder = Some(coder);
        let Coded { records, payload, saved, content, named, .. } = coded;
        let bytes = if records.is_empty() { 0 } else { body.len() as u64 };
        self.coding.observe_pages(level, content, bytes, busy);
        let compressed = content.saturating_sub(bytes);
        self.meter.memory(payload, &Saved { memory_compressed_bytes: compressed, ..saved });
        let names = named.len() as u64;
        let in_full = nonzero.saturating_sub(names) * crate::hypervisor::PAGE_BYTES as u64;
        self.ratio.observe(in_full, bytes.saturating_sub(names * NAME_BYTES));
        if records.is_empty() {
            return Ok(());
        }
        self.send(Class::Pages, MemoryKind::Pages, body, named).await
    }

    async fn send_waiting(&mut self, item: Waiting) -> Result<(), MigrationError> {
        match item {
            Waiting::Layout(layout) => {
                self.coder = Some(PageCoder::new(&layout, self.blocks.clone()));
                self.send_item(Class::DeviceState, MemoryKind::Layout(layout), Bytes::new()).await
            }
            Waiting::Opaque(bytes) => {
                let mut compressor = Compressor::new();
                let level = Level::default();
                for start in (0..bytes.len()).step_by(OPAQUE_BYTES) {
                    let part = bytes.slice(start..bytes.len().min(start + OPAQUE_BYTES));
                    let mut packed = Vec::new();
                    compressor.compress(level, part).encode_into(&mut packed);
                    self.send_item(Class::DeviceState, MemoryKind::Opaque, packed.into()).await?;
                }
                Ok(())
            }
            Waiting::PagesDone => {
                self.send_item(Class::DeviceState, MemoryKind::LastPass, Bytes::new()).await?;
                self.send_item(Class::DeviceState, MemoryKind::PagesDone, Bytes::new()).await
            }
            Waiting::NotUnderstood(reason) => {
                self.meter.note(format!(
                    "the memory stream is not understood ({reason}) and passes through compressed"
                ));
                let kind = MemoryKind::NotUnderstood { reason };
                self.send_item(Class::DeviceState, kind, Bytes::new()).await
            }
            Waiting::End => Ok(()),
        }
    }

    async fn send_item(
        &mut self,
        class: Class,
        kind: MemoryKind,
        body: Bytes,
    ) -> Result<(), MigrationError> {
        self.send(class, kind, body, Vec::new()).await
    }

    async fn send(
        &mut self,
        class: Class,
        kind: MemoryKind,
        body: Bytes,
        named: Vec<Page>,
    ) -> Result<(), MigrationError> {
        let item = self.link.next_memory_item();
        let bytes = body.len() as u64;
        self.under_way.push_back(UnderWay { item, bytes, named });
        self.link.send_bulk(class, &BulkHeader::Memory { item, kind }, body).await
    }
}

enum Work {
    Nothing,
    Pages(Vec<StagedPage>),
    Item(Waiting),
}

/// What goes next. Opaque bytes overtake pages, with which they have nothing to do; the marks that
/// end the pages wait for every page before them.
fn next_work(stage: &Stage) -> Work {
    let mut inner = stage.lock();
    let barrier = match inner.waiting.front() {
        None => false,
        Some(Waiting::Layout(_) | Waiting::Opaque(_)) => {
            return inner.take_waiting().map_or(Work::Nothing, Work::Item);
        }
        Some(Waiting::PagesDone | Waiting::NotUnderstood(_) | Waiting::End) => true,
    };
    let pages = inner.staging.take(MAX_PAGES_PER_BATCH, BATCH_BYTES);
    if !pages.is_empty() {
        Work::Pages(pages)
    } else if barrier {
        inner.take_waiting().map_or(Work::Nothing, Work::Item)
    } else {
        Work::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_pages_that_came_last() {
        let mut ratio = Ratio(None);
        assert_eq!(ratio.get(), 1.0);
        ratio.observe(0, 0);
        (0..100).for_each(|_| ratio.observe(1 << 20, 100 << 10));
        assert!((0.09..0.11).contains(&ratio.get()), "{ratio:?}");
        (0..32).for_each(|_| ratio.observe(1 << 20, 600 << 10));
        assert!((0.55..0.6).contains(&ratio.get()), "{ratio:?}");
    }
}
