//! The sending half: reads a view, cuts it into chunks, offers them or sends them at once.
//!
//! Invariant: of each chunk that the target wants exactly the bytes that were hashed are sent, and
//! at most [`OFFERS_MAX`] parcels are held in memory, so a slow link slows the reader down.

use std::collections::HashMap;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use longhaul_dedup::bundle::{BundlePart, ChunkBundle, MAX_BUNDLE_PARTS};
use longhaul_dedup::chunk::{RawChunk, VerifiedChunk};
use longhaul_dedup::chunker::{self, ChunkerParams};
use longhaul_dedup::compress::Compressor;
use longhaul_dedup::offer::{Offer, Want};
use longhaul_dedup::recipe::RecipeEntry;
use longhaul_transport::Class;
use tokio::sync::{Mutex, Notify, Semaphore};

use super::super::coding::Coding;
use super::super::error::MigrationError;
use super::super::link::Link;
use super::super::message::BulkHeader;
use super::super::meter::Meter;
use super::record::ImageRecord;
use crate::hypervisor::{DiskView, Extent};

/// Payload bytes in a parcel: what is read, hashed and offered as one.
const PARCEL_BYTES: u64 = 4 << 20;
/// One read; the hypervisor's export takes at most 4 MiB.
const READ_BYTES: u64 = 512 << 10;
/// Reads of one parcel under way at once.
const READS_AHEAD: usize = 8;
/// Parcels that are read ahead of the link.
const PARCELS_AHEAD: usize = 2;
/// Offers whose answer is not here, or whose chunks are not sent, at most: 64 MiB of payload. At
/// 200 ms and 1 Gbit/s 25 MiB are on their way.
const OFFERS_MAX: u32 = 16;
/// Payload bytes compressed as one.
const BUNDLE_BYTES: u64 = 1 << 20;
/// How full the queue before the link is taken to be: QUIC's back-pressure does not tell.
const NEITHER_FULL_NOR_EMPTY: f32 = 0.5;

/// Whether the target is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum How {
    /// Ids first, and then only what the target lacks: for data that it may have.
    Offer,
    /// At once: for data just written by the guest, when a round trip counts.
    Push,
}

struct Chunk {
    offset: u64,
    content: VerifiedChunk,
}

impl Chunk {
    fn bytes(&self) -> u64 {
        self.content.data().len() as u64
    }

    fn entry(&self) -> RecipeEntry {
        let len = self.content.data().len() as u32;
        RecipeEntry { offset: self.offset, len, id: self.content.id() }
    }
}

/// An offer that waits for its answer.
struct Open {
    offer: Offer,
    chunks: Vec<Chunk>,
}

/// What a parcel came to.
struct Parcel {
    chunks: Vec<Chunk>,
    zeros: Vec<(u64, u64)>,
}

/// Sends views of one VM's disks.
pub(in super::super) struct DiskSender<'a> {
    link: &'a Link,
    meter: &'a Meter,
    coding: &'a Coding,
    record: &'a ImageRecord,
}

impl<'a> DiskSender<'a> {
    pub(in super::super) fn new(
        link: &'a Link,
        meter: &'a Meter,
        coding: &'a Coding,
        record: &'a ImageRecord,
    ) -> Self {
        Self { link, meter, coding, record }
    }

    /// Sends what a view covers. Returns once everything is with the transport.
    pub(in super::super) async fn send(
        &self,
        disk: u16,
        view: &dyn DiskView,
        how: How,
        class: Class,
    ) -> Result<(), MigrationError> {
        let extents = view.extents().await?;
        self.meter.expect(extents.iter().map(|extent| extent.len).sum());
        let mut zeros = Vec::new();
        for extent in extents.iter().filter(|extent| extent.zero) {
            self.meter.disk_zero(extent.len);
            zeros.push((extent.offset, extent.len));
        }
        self.send_zeros(disk, class, &zeros).await?;

        let mut parcels = stream::iter(plan(&extents))
            .map(|pieces| read_parcel(view, pieces))
            .buffered(PARCELS_AHEAD);
        match how {
            How::Push => {
                while let Some(parcel) = parcels.next().await {
                    let parcel = self.without_zeros(disk, class, parcel?).await?;
                    self.send_chunks(disk, class, parcel).await?;
                }
                Ok(())
            }
            How::Offer => {
                let pending = Mutex::new(HashMap::new());
                let room = Semaphore::new(OFFERS_MAX as usize);
                let finished = Notify::new();
                let offering = async {
                    while let Some(parcel) = parcels.next().await {
                        let chunks = self.without_zeros(disk, class, parcel?).await?;
                        if chunks.is_empty() {
                            continue;
                        }
                        let permit = tokio::select! {
                            permit = room.acquire() => permit,
                            lost = self.link.lost() => return Err(lost),
                        };
                        permit.expect("the semaphore is never closed").forget();
                        self.offer(disk, class, chunks, &pending).await?;
                    }
                    tokio::select! {
                        all = room.acquire_many(OFFERS_MAX) => drop(all),
                        lost = self.link.lost() => return Err(lost),
                    }
                    finished.notify_one();
                    Ok(())
                };
                let answering = async {
                    loop {
                        let (item, wanted) = tokio::select! {
                            want = self.link.want() => want?,
                            () = finished.notified() => return Ok(()),
                        };
                        let offered = pending.lock().await.remove(&item);
                        let (disk, chunks) = self.wanted(item, offered, &wanted)?;
                        self.send_chunks(disk, class, chunks).await?;
                        room.add_permits(1);
                    }
                };
                tokio::try_join!(offering, answering).map(|_| ())
            }
        }
    }

    async fn send_zeros(
        &self,
        disk: u16,
        class: Class,
        zeros: &[(u64, u64)],
    ) -> Result<(), MigrationError> {
        self.record.void(disk, zeros.iter().map(|&(offset, len)| offset..offset + len));
        for some in zeros.chunks(MAX_BUNDLE_PARTS) {
            let parts =
                some.iter().map(|&(offset, len)| BundlePart::Zero { offset, len }).collect();
            self.send_bundle(class, ChunkBundle { disk, parts }).await?;
        }
        Ok(())
    }

    /// Sends the zero chunks of a parcel as what they are and leaves the others.
    async fn without_zeros(
        &self,
        disk: u16,
        class: Class,
        parcel: Parcel,
    ) -> Result<Vec<Chunk>, MigrationError> {
        self.meter.disk_zero(parcel.zeros.iter().map(|(_, len)| len).sum());
        self.send_zeros(disk, class, &parcel.zeros).await?;
        let entries: Vec<RecipeEntry> = parcel.chunks.iter().map(Chunk::entry).collect();
        self.record.chunks(disk, &entries);
        Ok(parcel.chunks)
    }

    async fn offer(
        &self,
        disk: u16,
        class: Class,
        chunks: Vec<Chunk>,
        pending: &Mutex<HashMap<u64, Open>>,
    ) -> Result<(), MigrationError> {
        let item = self.link.next_disk_item();
        let entries = chunks.iter().map(Chunk::entry).collect();
        let offer = Offer { disk, first: item, entries };
        let body = offer.encode();
        pending.lock().await.insert(item, Open { offer, chunks });
        self.link.send_bulk(class, &BulkHeader::Offer { item }, body).await
    }

    /// The chunks of an offer that the target asked for.
    fn wanted(
        &self,
        item: u64,
        offered: Option<Open>,
        wanted: &[u8],
    ) -> Result<(u16, Vec<Chunk>), MigrationError> {
        let bad = |detail: String| MigrationError::protocol(self.link.peer(), detail);
        let want = Want::decode(wanted).map_err(|error| bad(error.to_string()))?;
        let Some(Open { offer, chunks }) = offered.filter(|open| want.answers(&open.offer)) else {
            return Err(bad(format!("it answers item {item}, which is no open offer")));
        };
        let (mut chosen, mut known) = (Vec::new(), 0);
        for (chunk, wanted) in chunks.into_iter().zip(want.wanted()) {
            if *wanted {
                chosen.push(chunk);
            } else {
                known += chunk.bytes();
            }
        }
        self.meter.disk_known(known);
        Ok((offer.disk, chosen))
    }

    async fn send_chunks(
        &self,
        disk: u16,
        class: Class,
        chunks: Vec<Chunk>,
    ) -> Result<(), MigrationError> {
        let mut rest = chunks.into_iter().peekable();
        while rest.peek().is_some() {
            let mut parts = Vec::new();
            let mut payload = 0;
            while payload < BUNDLE_BYTES
                && parts.len() < MAX_BUNDLE_PARTS
                && let Some(chunk) = rest.next()
            {
                payload += chunk.bytes();
                parts.push(BundlePart::Chunk { offset: chunk.offset, chunk: chunk.content });
            }
            let sent = self.send_bundle(class, ChunkBundle { disk, parts }).await?;
            self.meter.disk_sent(payload, sent);
        }
        Ok(())
    }

    /// Codes and sends a bundle; returns its coded length.
    async fn send_bundle(&self, class: Class, bundle: ChunkBundle) -> Result<u64, MigrationError> {
        let level = self.coding.level(self.link.bytes_per_s(), NEITHER_FULL_NOR_EMPTY);
        let coding = tokio::task::spawn_blocking(move || {
            let payload: u64 = bundle
                .parts
                .iter()
                .map(|part| match part {
                    BundlePart::Chunk { chunk, .. } => chunk.data().len() as u64,
                    BundlePart::Zero { .. } => 0,
                })
                .sum();
            let began = Instant::now();
            let body = bundle.encode(&mut Compressor::new(), level);
            (payload, body, began.elapsed())
        });
        let (payload, body, busy) = coding.await.expect("encoding does not panic");
        let bytes = body.len() as u64;
        self.coding.observe(level, payload, bytes, busy);
        let item = self.link.next_disk_item();
        self.link.send_bulk(class, &BulkHeader::Chunks { item }, body).await?;
        Ok(bytes)
    }
}

/// Groups the data extents into parcels of neighbouring pieces.
fn plan(extents: &[Extent]) -> Vec<Vec<(u64, u64)>> {
    let mut parcels = Vec::new();
    let mut pieces = Vec::new();
    let mut room = PARCEL_BYTES;
    for extent in extents.iter().filter(|extent| !extent.zero) {
        let (mut offset, mut left) = (extent.offset, extent.len);
        while left > 0 {
            let len = left.min(room);
            pieces.push((offset, len));
            offset += len;
            left -= len;
            room -= len;
            if room == 0 {
                parcels.push(std::mem::take(&mut pieces));
                room = PARCEL_BYTES;
            }
        }
    }
    if !pieces.is_empty() {
        parcels.push(pieces);
    }
    parcels
}

async fn read_parcel(
    view: &dyn DiskView,
    pieces: Vec<(u64, u64)>,
) -> Result<Parcel, MigrationError> {
    let reads: Vec<(usize, u64, u32)> = pieces
        .iter()
        .enumerate()
        .flat_map(|(piece, &(offset, len))| {
            (0..len.div_ceil(READ_BYTES)).map(move |part| {
                let start = part * READ_BYTES;
                (piece, offset + start, (len - start).min(READ_BYTES) as u32)
            })
        })
        .collect();
    let mut contents: Vec<BytesMut> =
        pieces.iter().map(|&(_, len)| BytesMut::with_capacity(len as usize)).collect();
    let mut done = stream::iter(reads)
        .map(|(piece, offset, len)| async move { (piece, view.read(offset, len).await) })
        .buffered(READS_AHEAD);
    while let Some((piece, data)) = done.next().await {
        contents[piece].extend_from_slice(&data?);
    }
    let pieces: Vec<(u64, Bytes)> = pieces
        .iter()
        .zip(contents)
        .map(|(&(offset, _), content)| (offset, content.freeze()))
        .collect();
    let parcel = tokio::task::spawn_blocking(move || cut(&pieces)).await;
    Ok(parcel.expect("cutting does not panic"))
}

/// Cuts pieces into chunks and hashes them.
fn cut(pieces: &[(u64, Bytes)]) -> Parcel {
    let params = ChunkerParams::default();
    let mut parcel = Parcel { chunks: Vec::new(), zeros: Vec::new() };
    for (offset, data) in pieces {
        for cut in chunker::chunks(params, data) {
            let start = cut.offset as usize;
            let chunk = data.slice(start..start + cut.len as usize);
            let offset = offset + cut.offset;
            if chunker::is_zero(&chunk) {
                parcel.zeros.push((offset, chunk.len() as u64));
            } else {
                parcel.chunks.push(Chunk { offset, content: RawChunk::new(chunk).hash() });
            }
        }
    }
    parcel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parcels_cover_the_data_once_and_are_bounded() {
        let extents = [
            Extent { offset: 0, len: 4096, zero: false },
            Extent { offset: 4096, len: 1 << 30, zero: true },
            Extent { offset: 1 << 31, len: 3 * PARCEL_BYTES, zero: false },
            Extent { offset: 1 << 40, len: 1, zero: false },
        ];
        let parcels = plan(&extents);
        let total: u64 = parcels.iter().flatten().map(|(_, len)| len).sum();
        assert_eq!(total, 4096 + 3 * PARCEL_BYTES + 1);
        for parcel in &parcels {
            assert!(parcel.iter().map(|(_, len)| len).sum::<u64>() <= PARCEL_BYTES);
        }
    }

    #[test]
    fn zero_chunks_are_told_apart() {
        let mut data = vec![0; 1 << 20];
        data[600_000..].fill(7);
        let parcel = cut(&[(1 << 20, Bytes::from(data))]);
        let zeros: u64 = parcel.zeros.iter().map(|(_, len)| len).sum();
        let chunks: u64 = parcel.chunks.iter().map(|chunk| chunk.bytes()).sum();
        assert_eq!(zeros + chunks, 1 << 20);
        assert!(zeros > 0 && chunks > 0);
    }
}
