//! The receiving half: says what lies here of what the source has, checks pieces, writes images.
//!
//! Invariant: every item is checked against the disk's bounds before anything is done with it; a
//! place in an image is believed to hold a piece only after it was read and hashed, but for an image
//! whose record is complete and which nobody touched since.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use longhaul_dedup::blocks::{self, BLOCK_BYTES, PARCEL_BYTES, ShortId};
use longhaul_dedup::bundle::{BundleError, BundlePart};
use longhaul_dedup::chunk::{self, VerifiedChunk};
use longhaul_dedup::grains;
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::offer::{Answer, Bases, BlockList, MAX_NAMES, Offer};
use longhaul_dedup::pages::PageHash;
use longhaul_dedup::patch::Patch;
use longhaul_dedup::recipe::{
    GrainSample, ImageIdentity, RecipeEntry, RecipeError, RecipeLog, Sample,
};
use longhaul_dedup::summary::{MAX_SUMMARIES, Summaries, Summary, parcel_range};
use longhaul_dedup::zeros::{ZERO_GRANULARITY, split_zero_runs};

use super::super::error::MigrationError;
use super::super::known::Known;
use super::super::message::{BulkHeader, MAX_LACKING, ToSource};
use super::ROOM_MIB;
use super::assemble::{Assemblies, Made, MadePiece, Slot};
use super::find::{Finder, Shift};
use super::layout::Layout;
use super::record;
use super::unpack::{Bundle, Content, Unpacked};
use crate::hypervisor::{DiskImage, DiskInfo, IncomingDisk};

/// Pieces that are waited for at several places; beyond it a repeated piece is asked for again.
const WAITING_MAX: usize = 1 << 16;
/// Written bytes that are made durable at once: a round that ends with a gigabyte in the page cache
/// would hold up whoever waits for its end.
const FLUSH_BYTES: u64 = 64 << 20;

/// A disk that arrives.
pub(super) struct Disk {
    pub(super) info: DiskInfo,
    pub(super) image: Box<dyn DiskImage>,
    log: RecipeLog,
    path: PathBuf,
    /// The image that it is until it is first written to, as that was when this attempt began.
    begins_as: Option<(PathBuf, ImageIdentity)>,
    /// The record was complete and the image untouched when this attempt began: what it says of
    /// places that were not written since needs no reading.
    trusted: bool,
    /// Where there is data, as it was when it was first asked for.
    layout: Option<Layout>,
    /// Parcels that were compared as parts of a range which differs, and not written to since.
    compared: HashMap<u64, Summary>,
    /// Nothing but zeros was there: zeros need not be written in the first round.
    pub(super) fresh: bool,
}

/// Pieces of an offer that are wanted, and where those around each were found.
struct Offered {
    disk: u16,
    pieces: Vec<(RecipeEntry, Vec<Shift>)>,
}

/// Receives the disks of one attempt.
pub(in super::super) struct DiskReceiver {
    peer: String,
    disks: Vec<Disk>,
    finder: Finder,
    /// By the item that offered them: their blocks are named next.
    offered: HashMap<u64, Offered>,
    assemblies: Assemblies,
    /// Places that want a piece which is already on its way for another one.
    waiting: HashMap<ChunkId, Vec<(u16, RecipeEntry)>>,
    /// Pieces that did not come together, to be asked for at the end of their disk.
    lacking: Vec<(u16, RecipeEntry)>,
    /// The end of a disk that was told before everything else had come: its item.
    ending: Option<(u64, u16)>,
    items: u64,
    /// Bytes written since the last flush.
    unflushed: u64,
}

impl DiskReceiver {
    /// Opens the record of each arriving disk and indexes what else lies here.
    pub(in super::super) async fn open(
        peer: &str,
        infos: Vec<DiskInfo>,
        incoming: Vec<IncomingDisk>,
        known: Known,
    ) -> Result<Self, MigrationError> {
        let mut finder = Finder::new(incoming.len(), known.places);
        finder.add_grains_of_others();
        for image in known.images {
            if !incoming.iter().any(|disk| disk.path == image.path) {
                finder.add_other(&image);
            }
        }
        let mut disks = Vec::new();
        for (number, (info, incoming)) in infos.into_iter().zip(incoming).enumerate() {
            let recipe = RecipeLog::path_for(&incoming.path);
            let log = if incoming.fresh {
                RecipeLog::create(&recipe, info.bytes)
            } else {
                // What cannot be read, or is of another size, tells nothing: start anew.
                RecipeLog::open(&recipe)
                    .ok()
                    .filter(|log| log.recipe().image_bytes() == info.bytes)
                    .map_or_else(|| RecipeLog::create(&recipe, info.bytes), Ok)
            };
            let log = log.map_err(recipe_error)?;
            let begins_as = match incoming.begins_as {
                Some(old) => {
                    let now = identity(&old).map_err(looking_at(&old))?;
                    Some((old, now))
                }
                None => None,
            };
            // What lies in the image that it begins as is found there: here it will be overwritten.
            if !begins_as.as_ref().is_some_and(|(old, _)| finder.begins_as(number as u16, old)) {
                finder.add(number as u16, log.recipe());
            }
            let holds = begins_as.as_ref().map_or(&incoming.path, |(old, _)| old);
            disks.push(Disk {
                trusted: is_untouched(&log, holds),
                info,
                image: incoming.image,
                log,
                path: incoming.path,
                begins_as,
                layout: None,
                compared: HashMap::new(),
                fresh: incoming.fresh,
            });
        }
        Ok(Self {
            peer: peer.to_owned(),
            disks,
            finder,
            offered: HashMap::new(),
            assemblies: Assemblies::default(),
            waiting: HashMap::new(),
            lacking: Vec::new(),
            ending: None,
            items: 0,
            unflushed: 0,
        })
    }

    /// Items applied so far.
    pub(in super::super) fn items(&self) -> u64 {
        self.items
    }

    /// Whether a disk is, untouched, what it was when the seed of `generation` was kept.
    pub(in super::super) fn is_at(&self, disk: usize, generation: u64) -> bool {
        let disk = &self.disks[disk];
        disk.log.complete().is_some_and(|kept| kept.generation == generation)
            && is_untouched(&disk.log, &disk.path)
    }

    /// A round is over: from here on zeros overwrite something, and what was written is made
    /// durable now, so that little is left to do while the guest is paused.
    pub(in super::super) async fn round_done(&mut self) -> Result<(), MigrationError> {
        for disk in &mut self.disks {
            disk.fresh = false;
        }
        self.flush().await
    }

    /// Applies an item; a question has an answer.
    pub(in super::super) async fn apply(
        &mut self,
        item: Unpacked,
    ) -> Result<Option<ToSource>, MigrationError> {
        let want = |item, wanted, plain| {
            let wanted = Answer(wanted).encode();
            Some(ToSource::Want { item, wanted, plain, bases: Vec::new() })
        };
        let (header, body) = match item.content {
            Content::Body(body) => (item.header, body),
            Content::Bundle(bundle) => {
                self.write_bundle(bundle).await?;
                return Ok(self.applied(None));
            }
        };
        let answer = match header {
            BulkHeader::Summaries { item } => {
                let summaries = Summaries::decode(&body).map_err(|error| self.bad(error))?;
                let (differ, plain) = self.compare(&summaries).await?;
                want(item, differ, plain)
            }
            BulkHeader::Range { item, disk, first, parcels, hash } => {
                let summary = hash.map_or(Summary::Zeros, Summary::Pieces);
                let (differs, plain) = self.compare_range(disk, first, parcels, summary).await?;
                want(item, vec![differs], plain)
            }
            BulkHeader::Offer { item } => {
                let offer = Offer::decode(&body).map_err(|error| self.bad(error))?;
                let (wanted, plain) = self.look_for_pieces(item, &offer).await?;
                want(item, wanted, plain)
            }
            BulkHeader::Blocks { item } => {
                let list = BlockList::decode(&body).map_err(|error| self.bad(error))?;
                let (wanted, bases) = self.look_for_blocks(list).await?;
                let (wanted, bases) = (Answer(wanted).encode(), bases.encode());
                Some(ToSource::Want { item, wanted, plain: false, bases })
            }
            BulkHeader::End { item, disk } => {
                self.check_disk(disk)?;
                self.ending = Some((item, disk));
                None
            }
            BulkHeader::Chunks { .. } | BulkHeader::Memory { .. } => {
                return Err(self.bad("an item among the disk's that is none"));
            }
        };
        Ok(self.applied(answer))
    }

    /// Counts an item, and says what is to be answered.
    fn applied(&mut self, answer: Option<ToSource>) -> Option<ToSource> {
        self.items += 1;
        // An end may overtake what was sent before it.
        if let Some((item, disk)) = self.ending
            && answer.is_none()
            && self.items > item
        {
            self.ending = None;
            return Some(ToSource::Lacking { item, pieces: self.lacking(disk) });
        }
        answer
    }

    /// Which parcels differ from what is here, and whether all will.
    async fn compare(
        &mut self,
        summaries: &Summaries,
    ) -> Result<(Vec<bool>, bool), MigrationError> {
        let number = summaries.disk;
        self.check_disk(number)?;
        self.check_parcels(number, summaries.first, summaries.parcels.len() as u64)?;
        let mut differ = Vec::with_capacity(summaries.parcels.len());
        for (parcel, summary) in (summaries.first..).zip(&summaries.parcels) {
            differ.push(self.summary(number, parcel).await? != *summary);
        }
        Ok((differ, self.disks[usize::from(number)].fresh))
    }

    /// Whether parcels side by side differ from what is here, and whether all will. If they do, each is
    /// asked about next, and not read again for that.
    async fn compare_range(
        &mut self,
        number: u16,
        first: u64,
        parcels: u32,
        summary: Summary,
    ) -> Result<(bool, bool), MigrationError> {
        self.check_disk(number)?;
        self.check_parcels(number, first, u64::from(parcels))?;
        let mut here = Vec::new();
        for parcel in (first..).take(parcels as usize) {
            here.push(self.summary(number, parcel).await?);
        }
        let disk = &mut self.disks[usize::from(number)];
        let differs = Summary::of_many(&here) != summary;
        if differs && !disk.fresh {
            disk.compared.extend((first..).zip(here));
        }
        Ok((differs, disk.fresh))
    }

    /// What a parcel here is. If nothing vouches for it, it is read, and what was found is recorded.
    async fn summary(&mut self, number: u16, parcel: u64) -> Result<Summary, MigrationError> {
        let disk = &mut self.disks[usize::from(number)];
        let place = match parcel_range(parcel, disk.info.bytes) {
            Some(place) if !disk.fresh => place,
            _ => return Ok(Summary::Zeros),
        };
        let place = &place;
        if let Some(summary) = disk.compared.remove(&parcel) {
            return Ok(summary);
        }
        if disk.trusted
            && let Some(pieces) = disk.log.recipe().known(place)
        {
            return Ok(Summary::of(place, pieces));
        }
        if disk.layout.is_none() {
            let extents = disk.image.extents().await?;
            disk.layout = Some(Layout::of(&extents, disk.info.bytes));
        }
        let Some(part) = disk.layout.as_ref().and_then(|layout| layout.part(parcel)) else {
            return Ok(Summary::Zeros);
        };
        let found = part.read(|offset, len| disk.image.read(offset, len)).await?;
        let known = disk.log.recipe().known(place);
        let entries = found.scan.pieces.iter().map(blocks::Piece::entry);
        if !known.is_some_and(|known| known.into_iter().eq(entries)) {
            record::note(&mut disk.log, &found.scan, &found.zeros).map_err(recipe_error)?;
            let cutting = tokio::task::spawn_blocking(move || (found.grains(), found));
            let (grains, found) = cutting.await.expect("cutting does not panic");
            disk.log.append_grains(&grains).map_err(recipe_error)?;
            self.finder.add_scan(number, &found.scan);
            self.finder.add_grains(number, grains.into_iter());
            return Ok(found.summary());
        }
        Ok(found.summary())
    }

    /// Which pieces of an offer are not here, and whether they are wanted whole.
    async fn look_for_pieces(
        &mut self,
        item: u64,
        offer: &Offer,
    ) -> Result<(Vec<bool>, bool), MigrationError> {
        self.check_disk(offer.disk)?;
        let mut wanted = Vec::with_capacity(offer.entries.len());
        let mut missing: Vec<(RecipeEntry, Vec<Shift>)> = Vec::new();
        let mut before = None;
        let mut open = 0;
        // Everything is read before anything is written: the places may be of one image.
        let mut copies = Vec::new();
        for entry in &offer.entries {
            self.check_range(offer.disk, entry.offset, u64::from(entry.len))?;
            let found = self.find(offer.disk, entry).await;
            wanted.push(matches!(found, Found::Missing));
            match found {
                Found::Missing => missing.push((*entry, Vec::from_iter(before))),
                Found::OnItsWay => {}
                Found::Here(shift, copy) => {
                    copies.extend(copy.map(|chunk| (entry, chunk)));
                    for (_, shifts) in &mut missing[open..] {
                        shifts.push(shift);
                    }
                    open = missing.len();
                    before = Some(shift);
                }
            }
        }
        for (entry, chunk) in copies {
            self.copy(offer.disk, entry, &chunk).await?;
        }
        let fresh = self.disks[usize::from(offer.disk)].fresh;
        let plain = fresh && !self.finder.has_blocks();
        if plain || missing.is_empty() {
            return Ok((wanted, plain));
        }
        let offered = Offered { disk: offer.disk, pieces: missing };
        self.offered.insert(item, offered);
        if self.offered.len() > ROOM_MIB {
            return Err(self.bad("it offers more at once than it may"));
        }
        Ok((wanted, false))
    }

    /// Which blocks of offered pieces are not here, and what is similar to those that are not.
    async fn look_for_blocks(
        &mut self,
        list: BlockList,
    ) -> Result<(Vec<bool>, Bases), MigrationError> {
        let Some(Offered { disk, pieces }) = self.offered.remove(&list.offer) else {
            return Err(self.bad(format!("it names blocks of item {}, no open offer", list.offer)));
        };
        if pieces.iter().map(|(entry, _)| entry.blocks()).sum::<usize>() != list.blocks.len() {
            return Err(self.bad("it names other blocks than its offer has"));
        }
        let mut wanted = Vec::with_capacity(list.blocks.len());
        let mut ids: &[ShortId] = &list.blocks;
        let mut samples = list.samples.into_iter().peekable();
        let mut bases = Bases::default();
        let (mut begin, mut names_left) = (0, MAX_NAMES);
        // Everything is read before anything is written: the places may be of one image.
        let mut all_made = Vec::new();
        for (number, (entry, mut shifts)) in pieces.into_iter().enumerate() {
            let end = begin + u64::from(entry.len);
            let of_piece = std::iter::from_fn(|| samples.next_if(|(at, _)| *at < end));
            let samples: Vec<_> = of_piece.map(|(at, id)| (at - begin, id)).collect();
            begin = end;
            let (here, rest) = ids.split_at(entry.blocks());
            ids = rest;
            let has_room = self.assemblies.has_room();
            let found = if has_room {
                self.finder.blocks(&self.disks, disk, &entry, here, &mut shifts).await
            } else {
                vec![Slot::Missing; here.len()]
            };
            let base = if has_room && found.contains(&Slot::Missing) {
                let of = (&found[..], &samples[..]);
                self.finder.base(&self.disks, disk, &entry, of, &shifts).await
            } else {
                None
            };
            let begun = self.assemblies.begin(disk, entry, here, found);
            let (mut bits, made) = begun.map_err(|error| self.bad(error))?;
            if let Some(base) = base.filter(|base| base.len() <= names_left && bits.contains(&true))
            {
                names_left -= base.len();
                bases.0.push((number, base.names()));
                self.assemblies.set_base(disk, entry.offset, base, &bits);
            }
            wanted.append(&mut bits);
            all_made.extend(made);
        }
        for made in all_made {
            self.write_made(disk, made).await?;
        }
        Ok((wanted, bases))
    }

    /// Looks for a piece, or notes that it is waited for.
    async fn find(&mut self, number: u16, entry: &RecipeEntry) -> Found {
        let disk = &self.disks[usize::from(number)];
        let mut places = self.finder.pieces(entry).await;
        // Where it has to be, first: there is nothing to write then.
        if disk.log.recipe().at(entry.offset) == Some(*entry) {
            places.retain(|place| (place.image, place.offset) != (number, entry.offset));
            let place = longhaul_dedup::index::Location {
                image: number,
                offset: entry.offset,
                len: entry.len,
            };
            places.insert(0, place);
        }
        for place in places {
            let read = self.finder.read(&self.disks, place.image, place.offset, place.len).await;
            if let Some(data) = read
                && let Ok(found) = chunk::verify(entry.id, data)
            {
                let in_place = (place.image, place.offset) == (number, entry.offset);
                let copy = (!in_place).then_some(found);
                return Found::Here(self.finder.shift(entry.offset, place), copy);
            }
            // Changed since: nothing is lost but this hint.
            self.finder.forget(&entry.id, &place);
        }
        if let Some(places) = self.waiting.get_mut(&entry.id) {
            if places.len() < WAITING_MAX {
                places.push((number, *entry));
                return Found::OnItsWay;
            }
        } else if self.waiting.len() < WAITING_MAX {
            self.waiting.insert(entry.id, Vec::new());
        }
        Found::Missing
    }

    async fn write_bundle(
        &mut self,
        bundle: Result<Bundle, BundleError>,
    ) -> Result<(), MigrationError> {
        let bundle = bundle.map_err(|error| self.bad(error))?;
        let number = bundle.disk;
        self.check_disk(number)?;
        for (part, grains) in bundle.parts {
            let range = part.range();
            self.check_range(number, range.start, range.end - range.start)?;
            match part {
                BundlePart::Zero { offset, len } => {
                    self.overwrites(number, &range);
                    let disk = &mut self.disks[usize::from(number)];
                    if !disk.fresh {
                        disk.image.zero(offset, len).await?;
                    }
                    disk.log.append_zeros([range]).map_err(recipe_error)?;
                }
                BundlePart::Chunk { offset, chunk } => {
                    let (len, id) = (chunk.data().len() as u32, chunk.id());
                    self.write(number, &RecipeEntry { offset, len, id }, &chunk, &grains).await?;
                    self.arrived(&chunk).await?;
                }
                BundlePart::Blocks { offset, data } => {
                    let made = self.assemblies.put(number, offset, &data);
                    self.write_right(made.map_err(|error| self.bad(error))?).await?;
                }
                BundlePart::Patch { offset, data } => {
                    let patch = Patch::decode(&data).map_err(|error| self.bad(error))?;
                    let made = self.assemblies.put_patch(number, offset, &patch);
                    self.write_right(made.map_err(|error| self.bad(error))?).await?;
                }
            }
        }
        Ok(())
    }

    /// Writes those complete pieces that are what they should be; the others are asked for again.
    async fn write_right(&mut self, all_made: Vec<(u16, Made)>) -> Result<(), MigrationError> {
        for (number, made) in all_made {
            match made {
                Made::Right(made) => self.write_made(number, made).await?,
                Made::Wrong(entry) => self.lacking.push((number, entry)),
            }
        }
        Ok(())
    }

    /// Writes a piece to the other places that wait for it.
    async fn arrived(&mut self, chunk: &VerifiedChunk) -> Result<(), MigrationError> {
        let len = chunk.data().len() as u32;
        for (other, entry) in self.waiting.remove(&chunk.id()).unwrap_or_default() {
            // Its range was checked when it was offered, with this id.
            self.check_range(other, entry.offset, u64::from(len))?;
            self.copy(other, &RecipeEntry { len, ..entry }, chunk).await?;
        }
        Ok(())
    }

    /// Writes what a checked piece has that is not in place, and records it.
    async fn write_made(&mut self, number: u16, made: MadePiece) -> Result<(), MigrationError> {
        let entry = made.entry;
        self.overwrites(number, &(entry.offset..entry.offset + u64::from(entry.len)));
        let place = entry.offset..entry.offset + u64::from(entry.len);
        let mut grains: Vec<GrainSample> =
            self.disks[usize::from(number)].log.recipe().grains_in(place).collect();
        for (offset, run) in made.writes {
            let mut data = BytesMut::with_capacity(run.len() * BLOCK_BYTES);
            run.iter().for_each(|block| data.extend_from_slice(block));
            let data = data.freeze();
            let written = offset..offset + data.len() as u64;
            grains.retain(|grain| !written.contains(&grain.offset));
            grains.extend(grains_at(offset, &data));
            self.put(number, offset, data).await?;
        }
        self.note(number, &entry, &made.hashes, &grains)?;
        if self.waiting.contains_key(&entry.id) {
            let disk = &self.disks[usize::from(number)];
            let data = disk.image.read(entry.offset, entry.len).await?;
            // It is what was put together just now, unless the disk failed.
            if let Ok(whole) = chunk::verify(entry.id, data) {
                self.arrived(&whole).await?;
            }
        }
        self.flush_some().await
    }

    /// Writes a checked piece where another one may be: only what differs.
    async fn copy(
        &mut self,
        number: u16,
        entry: &RecipeEntry,
        chunk: &VerifiedChunk,
    ) -> Result<(), MigrationError> {
        let disk = &self.disks[usize::from(number)];
        let grains = grains_at(entry.offset, chunk.data());
        if disk.fresh {
            return self.write(number, entry, chunk, &grains).await;
        }
        let data = chunk.data();
        let there = disk.image.read(entry.offset, entry.len).await?;
        let same: Vec<bool> = data
            .chunks(BLOCK_BYTES)
            .zip(there.chunks(BLOCK_BYTES))
            .map(|(new, old)| new == old)
            .collect();
        self.overwrites(number, &(entry.offset..entry.offset + u64::from(entry.len)));
        let mut block = 0;
        for run in same.chunk_by(|one, next| one == next) {
            let start = block * BLOCK_BYTES;
            block += run.len();
            if !run[0] {
                let end = data.len().min(block * BLOCK_BYTES);
                self.put(number, entry.offset + start as u64, data.slice(start..end)).await?;
            }
        }
        self.note(number, entry, chunk.hashes(), &grains)?;
        self.flush_some().await
    }

    /// Writes a checked piece as it is.
    async fn write(
        &mut self,
        number: u16,
        entry: &RecipeEntry,
        chunk: &VerifiedChunk,
        grains: &[GrainSample],
    ) -> Result<(), MigrationError> {
        self.overwrites(number, &(entry.offset..entry.offset + u64::from(entry.len)));
        self.put(number, entry.offset, chunk.data().clone()).await?;
        self.note(number, entry, chunk.hashes(), grains)?;
        self.flush_some().await
    }

    /// Writes checked bytes, zeros within them as holes; [`overwrites`](Self::overwrites) comes first.
    async fn put(&mut self, number: u16, offset: u64, data: Bytes) -> Result<(), MigrationError> {
        let disk = &mut self.disks[usize::from(number)];
        for (range, zero) in split_zero_runs(&data, ZERO_GRANULARITY) {
            let at = offset + range.start as u64;
            match (zero, disk.fresh) {
                (true, true) => {}
                (true, false) => disk.image.zero(at, range.len() as u64).await?,
                (false, _) => disk.image.write(at, data.slice(range)).await?,
            }
        }
        self.unflushed += data.len() as u64;
        Ok(())
    }

    /// Records a piece that is in place.
    fn note(
        &mut self,
        number: u16,
        entry: &RecipeEntry,
        hashes: &[PageHash],
        grains: &[GrainSample],
    ) -> Result<(), MigrationError> {
        let samples: Vec<Sample> = blocks::samples(entry.offset, hashes).collect();
        let log = &mut self.disks[usize::from(number)].log;
        log.append(&[*entry]).map_err(recipe_error)?;
        log.append_samples(&samples).map_err(recipe_error)?;
        log.append_grains(grains).map_err(recipe_error)?;
        self.finder.add_piece(number, entry);
        self.finder.add_grains(number, grains.iter().copied());
        Ok(())
    }

    /// Something is about to be written where something else was being put together.
    fn overwrites(&mut self, number: u16, range: &Range<u64>) {
        let compared = &mut self.disks[usize::from(number)].compared;
        if !compared.is_empty() {
            for parcel in range.start / PARCEL_BYTES..range.end.div_ceil(PARCEL_BYTES) {
                compared.remove(&parcel);
            }
        }
        self.assemblies.overwritten(number, range);
        self.finder.written(number, range);
    }

    /// Pieces of a disk that nothing more will come for by itself.
    fn lacking(&mut self, disk: u16) -> Vec<(u64, u32)> {
        self.offered.clear();
        let open = self.assemblies.give_up(disk);
        self.lacking.extend(open.into_iter().map(|entry| (disk, entry)));
        let waiting = std::mem::take(&mut self.waiting);
        self.lacking.extend(waiting.into_values().flatten());
        let (here, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.lacking).into_iter().partition(|(number, _)| *number == disk);
        self.lacking = others;
        let (some, later) = here.split_at(here.len().min(MAX_LACKING));
        self.lacking.extend_from_slice(later);
        some.iter().map(|(_, entry)| (entry.offset, entry.len)).collect()
    }

    async fn flush_some(&mut self) -> Result<(), MigrationError> {
        if self.unflushed >= FLUSH_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    /// Returns once everything written so far is durable.
    pub(in super::super) async fn flush(&mut self) -> Result<(), MigrationError> {
        self.unflushed = 0;
        for disk in &mut self.disks {
            disk.image.flush().await?;
            disk.log.sync().map_err(recipe_error)?;
        }
        Ok(())
    }

    /// Flushes and gives the images up, so that a hypervisor may have them.
    pub(in super::super) async fn close(mut self) -> Result<(), MigrationError> {
        self.flush().await?;
        for disk in self.disks {
            disk.image.close().await?;
        }
        Ok(())
    }

    /// Gives the images up as the complete seed of `generation`.
    pub(in super::super) async fn keep(mut self, generation: u64) -> Result<(), MigrationError> {
        self.flush().await?;
        for mut disk in self.disks {
            disk.image.close().await?;
            let begun = disk.path.exists();
            let holds = match &disk.begins_as {
                // Nothing was written: the old image is what it should be, if it still is what it was.
                Some((old, before)) if !begun => {
                    if identity(old).map_err(looking_at(old))? != *before {
                        return Err(MigrationError::Io {
                            doing: format!("comparing with {}", old.display()),
                            source: std::io::Error::other("somebody wrote to it meanwhile"),
                        });
                    }
                    old
                }
                _ => &disk.path,
            };
            let now = identity(holds).map_err(looking_at(holds))?;
            disk.log.mark_complete(generation, now).map_err(recipe_error)?;
        }
        Ok(())
    }

    fn check_disk(&self, disk: u16) -> Result<(), MigrationError> {
        if usize::from(disk) < self.disks.len() {
            Ok(())
        } else {
            Err(self.bad(format!("there is no disk {disk}")))
        }
    }

    fn check_parcels(&self, disk: u16, first: u64, count: u64) -> Result<(), MigrationError> {
        let has = self.disks[usize::from(disk)].info.bytes.div_ceil(PARCEL_BYTES);
        if first.checked_add(count).is_some_and(|end| end <= has) && count <= MAX_SUMMARIES as u64 {
            Ok(())
        } else {
            Err(self.bad(format!("it asks about {count} parcels from {first} on of disk {disk}")))
        }
    }

    fn check_range(&self, disk: u16, offset: u64, len: u64) -> Result<(), MigrationError> {
        let bytes = self.disks[usize::from(disk)].info.bytes;
        if len > 0 && offset.checked_add(len).is_some_and(|end| end <= bytes) {
            Ok(())
        } else {
            Err(self.bad(format!("{len} bytes at {offset} are outside disk {disk}")))
        }
    }

    fn bad(&self, detail: impl ToString) -> MigrationError {
        MigrationError::protocol(&self.peer, detail)
    }
}

/// Samples of the grains of what lies at this byte.
pub(super) fn grains_at(offset: u64, data: &[u8]) -> Vec<GrainSample> {
    let sample = |(at, id)| GrainSample { offset: offset + at as u64, id };
    grains::samples(data).map(sample).collect()
}

/// Where a piece is.
enum Found {
    /// There; with its content unless it is in place.
    Here(Shift, Option<VerifiedChunk>),
    /// On its way for another place, and will be written here too.
    OnItsWay,
    Missing,
}

/// Whether an image is what its record was completed for.
fn is_untouched(log: &RecipeLog, image: &Path) -> bool {
    log.complete().is_some_and(|kept| identity(image).is_ok_and(|now| now == kept.image))
}

/// By what an image is recognised as untouched.
fn identity(image: &Path) -> std::io::Result<ImageIdentity> {
    Ok(ImageIdentity::of(&std::fs::metadata(image)?))
}

fn looking_at(path: &Path) -> impl FnOnce(std::io::Error) -> MigrationError + '_ {
    move |source| MigrationError::Io { doing: format!("looking at {}", path.display()), source }
}

fn recipe_error(error: RecipeError) -> MigrationError {
    MigrationError::Io {
        doing: "keeping the record of what an image holds".into(),
        source: std::io::Error::other(error),
    }
}
