//! The sending half: reads a view parcel by parcel, asks the target what it lacks of each, from the
//! whole to the block, and sends that; or sends everything at once.
//!
//! Invariant: what is sent as a piece is what its id says, and blocks are only sent for a piece that
//! still has the hash that was offered. Of at most [`PARCELS_UNDER_WAY`] parcels are hashes held, and of
//! [`KEPT_BYTES`] the data too; the rest is read again when it is wanted.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use longhaul_dedup::blocks::{BLOCK_BYTES, MAX_PIECE_BYTES, Piece, ShortId, hash_blocks};
use longhaul_dedup::bundle::BundlePart;
use longhaul_dedup::chunk::RawChunk;
use longhaul_dedup::grains::GrainName;
use longhaul_dedup::offer::{Answer, Bases, BlockList, Offer};
use longhaul_dedup::patch::Patch;
use longhaul_dedup::summary::{MAX_SUMMARIES, Summaries, Summary};
use longhaul_transport::Class;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use super::super::coding::Coding;
use super::super::error::MigrationError;
use super::super::link::Link;
use super::super::memory::KnownBlocks;
use super::super::message::{BulkHeader, MAX_LACKING, ToSource};
use super::super::meter::Meter;
use super::PARCELS_UNDER_WAY;
use super::layout::{Layout, Parcel, Part};
use super::pack::Packer;
use super::record::ImageRecord;
use crate::hypervisor::DiskView;

/// Parcels that are read ahead of the link: 32 MiB.
const PARCELS_AHEAD: usize = 2;
/// Data of parcels under way that is kept in memory, at most. At 200 ms and 1 Gbit/s 25 MiB are on their
/// way, which may be four times as much before compression.
const KEPT_BYTES: usize = 96 << 20;
/// As much is always kept, and beyond it what the link carries in so many seconds: behind a thin link all
/// that is kept just waits.
const KEPT_BYTES_MIN: usize = 48 << 20;
const KEPT_S: f64 = 3.0;
/// Parcels with data in one message of summaries. The first has one, and each twice as many as that
/// before, lest the first bytes wait for much reading.
const SUMMARIES_AT_ONCE: usize = 32;
/// Pieces that are read again at once.
const READS_AHEAD: usize = 8;
/// A patch saves at least one of so many bytes: it is compressed less well than what it stands for.
const PATCH_WORTHWHILE: usize = 16;
/// Times that a target may ask for pieces which did not come together, each with the most of them: a
/// disk of 16 TiB that changed throughout.
const LACKING_ROUNDS_MAX: usize = 1 << 18;

/// Whether the target is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum How {
    /// Ids first, and then only what the target lacks: for data that it may have.
    Offer,
    /// At once: for data just written by the guest, when a round trip counts.
    Push,
}

/// A parcel under way.
struct Sending {
    parcel: Parcel,
    /// Room for its data in memory.
    kept: Option<OwnedSemaphorePermit>,
}

/// A question that waits for its answer.
enum Question {
    Summaries(Vec<Sending>),
    Pieces(Sending),
    /// The pieces of the parcel whose blocks were named.
    Blocks(Sending, Vec<usize>),
}

/// Sends views of one VM's disks.
pub(in super::super) struct DiskSender<'a> {
    pub(super) link: &'a Link,
    pub(super) meter: &'a Meter,
    coding: &'a Coding,
    pub(super) record: &'a ImageRecord,
    /// What the target comes to hold, if somebody wants to know.
    blocks: Option<&'a KnownBlocks>,
    /// See [`KEPT_BYTES`].
    kept_bytes: usize,
}

impl<'a> DiskSender<'a> {
    pub(in super::super) fn new(
        link: &'a Link,
        meter: &'a Meter,
        coding: &'a Coding,
        record: &'a ImageRecord,
    ) -> Self {
        Self { link, meter, coding, record, blocks: None, kept_bytes: KEPT_BYTES }
    }

    /// One that notes what the target comes to hold.
    pub(in super::super) fn noting(self, blocks: &'a KnownBlocks) -> Self {
        Self { blocks: Some(blocks), ..self }
    }

    /// One that reads everything again.
    #[cfg(test)]
    pub(super) fn forgetful(self) -> Self {
        Self { kept_bytes: 0, ..self }
    }

    /// Room for a parcel's data, of all that there is room for.
    fn keep(&self, all: &Arc<Semaphore>, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let carried = (self.link.bytes_per_s() * KEPT_S) as usize;
        let beyond = self.kept_bytes.saturating_sub(carried.max(KEPT_BYTES_MIN));
        let fits = all.available_permits() >= beyond + bytes as usize;
        fits.then(|| Arc::clone(all).try_acquire_many_owned(bytes as u32).ok()).flatten()
    }

    /// Sends what a view covers. Returns once everything is with the transport and, after
    /// [`How::Offer`], once the target has put together all that was offered.
    pub(in super::super) async fn send(
        &self,
        disk: u16,
        view: &dyn DiskView,
        how: How,
        class: Class,
    ) -> Result<(), MigrationError> {
        let layout = Layout::of(&view.extents().await?, view.info().bytes);
        self.meter.expect(layout.covered());
        let mut parts: Vec<Part> = layout.parts().collect();
        if how == How::Offer {
            parts = self.recall(disk, parts, class).await?;
        }
        let kept_bytes = Arc::new(Semaphore::new(self.kept_bytes));
        let mut parcels = stream::iter(parts)
            .map(|part| part.read(|offset, len| view.read(offset, len)))
            .buffered(PARCELS_AHEAD);
        let sending = Disk {
            sender: self,
            disk,
            view,
            class,
            open: Mutex::default(),
            room: Semaphore::new(PARCELS_UNDER_WAY),
            compares: AtomicBool::new(true),
            packer: Packer::new(self.link, self.meter, self.coding, disk, class),
        };
        let offering = async {
            let mut batch = Batch { most: 1, ..Batch::default() };
            while let Some(parcel) = parcels.next().await {
                let mut parcel = parcel?;
                self.record.note(disk, &parcel.scan, &parcel.zeros);
                if let Some(blocks) = self.blocks {
                    blocks.note(disk, &parcel.scan, &parcel.zeros);
                }
                if how == How::Push {
                    sending.put_zeros(&parcel).await;
                    let all = (0..parcel.scan.pieces.len()).collect();
                    sending.send_pieces(&Sending { parcel, kept: None }, all).await?;
                    continue;
                }
                let kept = self.keep(&kept_bytes, parcel.data_bytes());
                if kept.is_none() {
                    parcel.stretches.clear();
                }
                sending.ask(Sending { parcel, kept }, &mut batch).await?;
            }
            sending.ask_batch(&mut batch).await?;
            if how == How::Push {
                sending.packer.flush().await;
                return Ok(());
            }
            // All parcels are dealt with once all room is free.
            let all = sending.room.acquire_many(PARCELS_UNDER_WAY as u32);
            sending.unless_lost(all).await?.expect("the semaphore is never closed").forget();
            sending.packer.flush().await;
            sending.end().await
        };
        let work = async {
            match how {
                How::Push => offering.await?,
                How::Offer => {
                    tokio::try_join!(offering, sending.hear())?;
                }
            }
            sending.packer.close();
            Ok(())
        };
        tokio::try_join!(work, sending.packer.run())?;
        if how == How::Offer && layout.is_whole() {
            self.record.is_whole(disk);
        }
        Ok(())
    }
}

/// A piece of which the target wants something.
struct Asked<'a> {
    piece: &'a Piece,
    wanted: &'a [bool],
    /// Names of the grains of what is similar there.
    base: Option<Vec<GrainName>>,
}

/// Parcels side by side whose summaries go together.
#[derive(Default)]
struct Batch {
    parcels: Vec<Sending>,
    with_data: usize,
    most: usize,
}

/// One view on its way.
struct Disk<'a> {
    sender: &'a DiskSender<'a>,
    disk: u16,
    view: &'a dyn DiskView,
    class: Class,
    open: Mutex<HashMap<u64, Question>>,
    /// For parcels with data.
    room: Semaphore,
    /// Whether summaries are of any use.
    compares: AtomicBool,
    packer: Packer<'a>,
}

impl Disk<'_> {
    /// Begins to ask about a parcel.
    async fn ask(&self, sending: Sending, batch: &mut Batch) -> Result<(), MigrationError> {
        let parcel = &sending.parcel;
        let has_data = !parcel.scan.pieces.is_empty();
        if has_data {
            let permit = match self.room.try_acquire() {
                Ok(permit) => permit,
                Err(_) => {
                    // What waits here must not be what is waited for.
                    self.ask_batch(batch).await?;
                    let permit = self.room.acquire();
                    self.unless_lost(permit).await?.expect("the semaphore is never closed")
                }
            };
            permit.forget();
        }
        if !self.compares.load(Ordering::Relaxed) || !parcel.part.is_whole() {
            self.ask_batch(batch).await?;
            return self.ask_pieces(sending).await;
        }
        if batch.parcels.last().is_some_and(|last| {
            last.parcel.part.parcel + 1 != parcel.part.parcel
                || batch.parcels.len() == MAX_SUMMARIES
        }) {
            self.ask_batch(batch).await?;
        }
        batch.with_data += usize::from(has_data);
        batch.parcels.push(sending);
        if batch.with_data >= batch.most {
            self.ask_batch(batch).await?;
            batch.most = SUMMARIES_AT_ONCE.min(2 * batch.most);
        }
        Ok(())
    }

    async fn ask_batch(&self, batch: &mut Batch) -> Result<(), MigrationError> {
        batch.with_data = 0;
        let parcels = std::mem::take(&mut batch.parcels);
        let Some(first) = parcels.first() else { return Ok(()) };
        let summaries: Vec<Summary> =
            parcels.iter().map(|sending| sending.parcel.summary()).collect();
        let first = first.parcel.part.parcel;
        let body = Summaries { disk: self.disk, first, parcels: summaries }.encode();
        let question = Question::Summaries(parcels);
        self.question(|item| BulkHeader::Summaries { item }, body, question).await
    }

    /// Offers the pieces of a parcel that differs, and sends its zeros.
    async fn ask_pieces(&self, sending: Sending) -> Result<(), MigrationError> {
        self.put_zeros(&sending.parcel).await;
        let entries: Vec<_> = sending.parcel.scan.pieces.iter().map(Piece::entry).collect();
        if entries.is_empty() {
            return Ok(());
        }
        let body = Offer { disk: self.disk, entries }.encode();
        self.question(|item| BulkHeader::Offer { item }, body, Question::Pieces(sending)).await
    }

    async fn question(
        &self,
        header: impl Fn(u64) -> BulkHeader,
        body: Bytes,
        question: Question,
    ) -> Result<(), MigrationError> {
        let item = self.sender.link.next_disk_item();
        self.open.lock().await.insert(item, question);
        self.sender.link.send_bulk(self.class, &header(item), body).await
    }

    /// Everything asked for is sent: what did not come together?
    async fn end(&self) -> Result<(), MigrationError> {
        let item = self.sender.link.next_disk_item();
        let header = BulkHeader::End { item, disk: self.disk };
        self.sender.link.send_bulk(self.class, &header, Bytes::new()).await
    }

    /// Deals with answers until the disk has come together.
    async fn hear(&self) -> Result<(), MigrationError> {
        let link = self.sender.link;
        for _ in 0..LACKING_ROUNDS_MAX {
            let lacking = loop {
                let answer = match link.want_ready().await {
                    Some(answer) => answer,
                    None => {
                        self.packer.hurry();
                        link.want().await?
                    }
                };
                match answer {
                    ToSource::Want { item, wanted, plain, bases } => {
                        self.answered(item, &wanted, plain, &bases).await?;
                    }
                    ToSource::Lacking { pieces, .. } => break pieces,
                    _ => return Err(self.bad("it answers what was not asked")),
                }
            };
            if lacking.is_empty() {
                return Ok(());
            }
            self.send_lacking(&lacking).await?;
            self.packer.flush().await;
            self.end().await?;
        }
        Err(self.bad("it never has what it was sent"))
    }

    async fn answered(
        &self,
        item: u64,
        wanted: &[u8],
        plain: bool,
        bases: &[u8],
    ) -> Result<(), MigrationError> {
        let question = self.open.lock().await.remove(&item);
        let decode = |count| {
            let answer = Answer::decode(wanted, count).map_err(|error| self.bad(error))?;
            Ok::<_, MigrationError>(answer.0)
        };
        match question {
            Some(Question::Summaries(parcels)) => {
                if plain {
                    self.compares.store(false, Ordering::Relaxed);
                }
                let differs = decode(parcels.len())?;
                // What is known makes room before anything waits for the link.
                for (sending, _) in parcels.iter().zip(&differs).filter(|(_, differs)| !**differs) {
                    self.is_known(&sending.parcel);
                }
                for (sending, _) in parcels.into_iter().zip(differs).filter(|(_, differs)| *differs)
                {
                    self.ask_pieces(sending).await?;
                }
                Ok(())
            }
            Some(Question::Pieces(sending)) => {
                let pieces = &sending.parcel.scan.pieces;
                let wanted = decode(pieces.len())?;
                let (missing, known): (Vec<usize>, Vec<usize>) =
                    (0..pieces.len()).partition(|piece| wanted[*piece]);
                let bytes = known.iter().map(|piece| u64::from(pieces[*piece].len)).sum();
                self.sender.meter.disk_known(bytes);
                if !missing.is_empty() && !plain {
                    return self.ask_blocks(item, sending, missing).await;
                }
                self.send_pieces(&sending, missing).await?;
                self.is_done(sending);
                Ok(())
            }
            Some(Question::Blocks(sending, pieces)) => {
                let scan = &sending.parcel.scan;
                let count = pieces.iter().map(|piece| scan.pieces[*piece].hashes.len()).sum();
                let bases = Bases::decode(bases, pieces.len()).map_err(|error| self.bad(error))?;
                self.send_blocks(&sending, &pieces, &decode(count)?, bases).await?;
                self.is_done(sending);
                Ok(())
            }
            None => Err(self.bad(format!("it answers item {item}, which is no open question"))),
        }
    }

    async fn ask_blocks(
        &self,
        offer: u64,
        sending: Sending,
        pieces: Vec<usize>,
    ) -> Result<(), MigrationError> {
        let cutting = tokio::task::spawn_blocking(move || {
            let samples = sending.parcel.samples_of(&pieces);
            (samples, sending, pieces)
        });
        let (samples, sending, pieces) = cutting.await.expect("cutting does not panic");
        let scan = &sending.parcel.scan;
        let hashes = pieces.iter().flat_map(|piece| scan.pieces[*piece].hashes.clone());
        let blocks = hashes.map(|at| ShortId::of(&scan.hashes[at])).collect();
        let body = BlockList { offer, blocks, samples }.encode();
        let question = Question::Blocks(sending, pieces);
        self.question(|item| BulkHeader::Blocks { item }, body, question).await
    }

    /// A parcel is at the target as it is here.
    fn is_known(&self, parcel: &Parcel) {
        self.sender.meter.disk_known(parcel.data_bytes());
        self.sender.meter.disk_zero(parcel.zero_bytes());
        if !parcel.scan.pieces.is_empty() {
            self.room.add_permits(1);
        }
    }

    /// All that was wanted of a parcel is sent.
    fn is_done(&self, sending: Sending) {
        drop(sending.kept);
        self.room.add_permits(1);
    }

    async fn put_zeros(&self, parcel: &Parcel) {
        self.sender.meter.disk_zero(parcel.zero_bytes());
        for range in &parcel.zeros {
            let len = range.end - range.start;
            self.packer.put(BundlePart::Zero { offset: range.start, len }).await;
        }
    }

    /// Sends whole pieces of a parcel.
    async fn send_pieces(
        &self,
        sending: &Sending,
        pieces: Vec<usize>,
    ) -> Result<(), MigrationError> {
        let places: Vec<(u64, u32)> = pieces
            .into_iter()
            .map(|piece| &sending.parcel.scan.pieces[piece])
            .map(|piece| (piece.offset, piece.len))
            .collect();
        let mut contents = stream::iter(places)
            .map(|place| self.content(Some(&sending.parcel), place))
            .buffered(READS_AHEAD);
        while let Some(content) = contents.next().await {
            let (offset, data) = content?;
            self.packer
                .put(BundlePart::Chunk { offset, chunk: RawChunk::new(own(&data)).hash() })
                .await;
        }
        Ok(())
    }

    /// Sends the wanted blocks of pieces, as patches where the target has something similar, or a whole
    /// piece if it was written meanwhile.
    async fn send_blocks(
        &self,
        sending: &Sending,
        pieces: &[usize],
        wanted: &[bool],
        bases: Bases,
    ) -> Result<(), MigrationError> {
        let scan = &sending.parcel.scan;
        let mut rest = wanted;
        let mut bases = bases.0.into_iter().peekable();
        let mut known = 0;
        let mut asked: Vec<Asked<'_>> = Vec::new();
        for (at, number) in pieces.iter().enumerate() {
            let piece = &scan.pieces[*number];
            let (these, others) = rest.split_at(piece.hashes.len());
            rest = others;
            let base = bases.next_if(|(piece, _)| *piece == at).map(|(_, names)| names);
            let sent = these.iter().filter(|wanted| **wanted).count() * BLOCK_BYTES;
            known += u64::from(piece.len).saturating_sub(sent as u64);
            if sent > 0 {
                asked.push(Asked { piece, wanted: these, base });
            }
        }
        self.sender.meter.disk_known(known);
        let places: Vec<(u64, u32)> =
            asked.iter().map(|asked| (asked.piece.offset, asked.piece.len)).collect();
        let mut contents = stream::iter(places)
            .map(|place| self.content(Some(&sending.parcel), place))
            .buffered(READS_AHEAD);
        for Asked { piece, wanted, base } in asked {
            let Some(content) = contents.next().await else { break };
            let (_, data) = content?;
            // What was kept cannot have changed.
            let is_kept = sending.kept.is_some();
            if !is_kept && hash_blocks(&data) != scan.hashes[piece.hashes.clone()] {
                let chunk = RawChunk::new(own(&data)).hash();
                self.packer.put(BundlePart::Chunk { offset: piece.offset, chunk }).await;
                continue;
            }
            if let Some(base) = base
                && let Some(patch) = self.patch(&data, wanted, base).await
            {
                self.packer.put(BundlePart::Patch { offset: piece.offset, data: patch }).await;
                continue;
            }
            for run in runs(wanted) {
                let start = run.start * BLOCK_BYTES;
                let end = data.len().min(run.end * BLOCK_BYTES);
                let offset = piece.offset + start as u64;
                self.packer.put(BundlePart::Blocks { offset, data: own(&data[start..end]) }).await;
            }
        }
        Ok(())
    }

    /// What makes the wanted blocks of a piece from what the target has, if that is worth it.
    async fn patch(&self, data: &Bytes, wanted: &[bool], base: Vec<GrainName>) -> Option<Bytes> {
        let blocks = data.chunks(BLOCK_BYTES).zip(wanted).filter(|(_, wanted)| **wanted);
        let bytes: usize = blocks.map(|(block, _)| block.len()).sum();
        let (data, wanted) = (data.clone(), wanted.to_vec());
        let making = tokio::task::spawn_blocking(move || Patch::make(&data, &wanted, &base));
        let patch = making.await.expect("looking for matches does not panic")?.encode();
        let saved = bytes.checked_sub(patch.len())?;
        if saved < bytes / PATCH_WORTHWHILE {
            return None;
        }
        self.sender.meter.disk_known(saved as u64);
        Some(patch)
    }

    /// Sends whole what did not come together at the target.
    async fn send_lacking(&self, pieces: &[(u64, u32)]) -> Result<(), MigrationError> {
        let bytes = self.view.info().bytes;
        let fits = |(offset, len): &(u64, u32)| {
            (1..=MAX_PIECE_BYTES).contains(len)
                && offset.checked_add(u64::from(*len)).is_some_and(|end| end <= bytes)
        };
        if pieces.len() > MAX_LACKING || !pieces.iter().all(fits) {
            return Err(self.bad("it asks for pieces that are none"));
        }
        tracing::debug!(disk = self.disk, pieces = pieces.len(), "pieces are sent again, whole");
        for place in pieces {
            let (offset, data) = self.content(None, *place).await?;
            self.packer
                .put(BundlePart::Chunk { offset, chunk: RawChunk::new(own(&data)).hash() })
                .await;
        }
        Ok(())
    }

    /// Bytes of the disk: those that were kept, or read again.
    async fn content(
        &self,
        parcel: Option<&Parcel>,
        (offset, len): (u64, u32),
    ) -> Result<(u64, Bytes), MigrationError> {
        match parcel.and_then(|parcel| parcel.kept(offset, len)) {
            Some(data) => Ok((offset, data)),
            None => Ok((offset, self.view.read(offset, len).await?)),
        }
    }

    /// Waits for something that only comes if the link lives.
    async fn unless_lost<T>(&self, waiting: impl Future<Output = T>) -> Result<T, MigrationError> {
        tokio::select! {
            came = waiting => Ok(came),
            lost = self.sender.link.lost() => Err(lost),
        }
    }

    fn bad(&self, detail: impl ToString) -> MigrationError {
        MigrationError::protocol(self.sender.link.peer(), detail)
    }
}

/// Bytes that keep nothing else in memory.
fn own(data: &[u8]) -> Bytes {
    Bytes::copy_from_slice(data)
}

/// Where in a row of answers something is wanted, side by side.
fn runs(wanted: &[bool]) -> Vec<Range<usize>> {
    let mut at = 0;
    let mut runs = Vec::new();
    for run in wanted.chunk_by(|one, next| one == next) {
        if run[0] {
            runs.push(at..at + run.len());
        }
        at += run.len();
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_blocks_go_in_runs() {
        assert_eq!(runs(&[true, true, false, true]), [0..2, 3..4]);
        assert!(runs(&[false, false]).is_empty());
    }
}
