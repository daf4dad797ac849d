//! The sending half: reads a view parcel by parcel, asks the target what it lacks of each, from the
//! whole to the block, and sends that; or sends everything at once.
//!
//! Invariant: what is sent as a piece is what its id says, and blocks are only sent for a piece that
//! still has the hash that was offered. Of parcels of at most [`ROOM_MIB`](super::ROOM_MIB) are hashes held, and of
//! [`KEPT_BYTES`] the data too; the rest is read again when it is wanted.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use longhaul_dedup::blocks::{BLOCK_BYTES, MAX_PIECE_BYTES, Piece, hash_blocks};
use longhaul_dedup::bundle::BundlePart;
use longhaul_dedup::chunk::RawChunk;
use longhaul_dedup::grains::GrainName;
use longhaul_dedup::offer::Bases;
use longhaul_dedup::patch::Patch;
use longhaul_transport::Class;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::super::coding::Coding;
use super::super::error::MigrationError;
use super::super::link::Link;
use super::super::memory::KnownBlocks;
use super::super::message::MAX_LACKING;
use super::super::meter::Meter;
use super::ask::{Batch, Questions};
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
/// Pieces that are read again at once.
const READS_AHEAD: usize = 8;
/// A patch saves at least one of so many bytes: it is compressed less well than what it stands for.
const PATCH_WORTHWHILE: usize = 16;

/// Whether the target is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum How {
    /// Ids first, and then only what the target lacks: for data that it may have.
    Offer,
    /// At once: for data just written by the guest, when a round trip counts.
    Push,
}

/// A parcel under way.
pub(super) struct Sending {
    pub(super) parcel: Parcel,
    /// Room for its data in memory.
    pub(super) kept: Option<OwnedSemaphorePermit>,
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
            questions: Questions::default(),
            packer: Packer::new(self.link, self.meter, self.coding, disk, class),
        };
        let offering = async {
            let mut batch = Batch::default();
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
            sending.ask_range(&mut batch).await?;
            if how == How::Push {
                sending.packer.flush().await;
                return Ok(());
            }
            sending.all_answered().await?;
            for part in sending.take_again().await {
                sending.ask_again(part).await?;
            }
            sending.all_answered().await?;
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

/// One view on its way.
pub(super) struct Disk<'a> {
    pub(super) sender: &'a DiskSender<'a>,
    pub(super) disk: u16,
    pub(super) view: &'a dyn DiskView,
    pub(super) class: Class,
    pub(super) questions: Questions,
    pub(super) packer: Packer<'a>,
}

impl Disk<'_> {
    pub(super) async fn put_zeros(&self, parcel: &Parcel) {
        self.sender.meter.disk_zero(parcel.zero_bytes());
        for range in &parcel.zeros {
            let len = range.end - range.start;
            self.packer.put(BundlePart::Zero { offset: range.start, len }).await;
        }
    }

    /// Sends whole pieces of a parcel.
    pub(super) async fn send_pieces(
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
    pub(super) async fn send_blocks(
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
    pub(super) async fn send_lacking(&self, pieces: &[(u64, u32)]) -> Result<(), MigrationError> {
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
    pub(super) async fn unless_lost<T>(
        &self,
        waiting: impl Future<Output = T>,
    ) -> Result<T, MigrationError> {
        tokio::select! {
            came = waiting => Ok(came),
            lost = self.sender.link.lost() => Err(lost),
        }
    }

    pub(super) fn bad(&self, detail: impl ToString) -> MigrationError {
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
