//! What the target is asked of a disk that is sent, from ranges of parcels to blocks, and what follows from its
//! answers.
//!
//! Invariant: each question is answered once, and what its answer is about has taken its part of
//! [`ROOM_MIB`] until then. Whoever hears answers never waits for room.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use longhaul_dedup::blocks::{Piece, ShortId};
use longhaul_dedup::offer::{Answer, Bases, BlockList, Offer};
use longhaul_dedup::summary::{MAX_SUMMARIES, Summaries, Summary};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use super::super::error::MigrationError;
use super::super::message::{BulkHeader, ToSource};
use super::ROOM_MIB;
use super::layout::{Parcel, Part};
use super::send::{Disk, Sending};

/// Parcels with data in one message of summaries. The first has one, and each twice as many as that
/// before, lest the first bytes wait for much reading.
const SUMMARIES_AT_ONCE: usize = 32;
/// Room that a range takes: eight of them under way keep a target reading.
const RANGE_ROOM: u32 = 16;
/// Parcels with data in one range: as much as a target reads in about a second.
const RANGE_PARCELS: usize = 64;
/// Times that a target may ask for pieces which did not come together, each with the most of them: a
/// disk of 16 TiB that changed throughout.
const LACKING_ROUNDS_MAX: usize = 1 << 18;

/// A parcel of which only this is held. It is read again if it differs.
struct Glimpse {
    part: Part,
    summary: Summary,
    data_bytes: u64,
    zero_bytes: u64,
}

impl Glimpse {
    fn of(parcel: Parcel) -> Self {
        let (data_bytes, zero_bytes) = (parcel.data_bytes(), parcel.zero_bytes());
        Self { summary: parcel.summary(), data_bytes, zero_bytes, part: parcel.part }
    }
}

/// A question that waits for its answer.
enum Question {
    Summaries(Vec<Sending>),
    /// About all these as one; then, if they differ, about each.
    Range(Vec<Glimpse>),
    Glimpses(Vec<Glimpse>),
    Pieces(Sending),
    /// The pieces of the parcel whose blocks were named.
    Blocks(Sending, Vec<usize>),
}

/// The open questions about a disk.
pub(super) struct Questions {
    open: Mutex<HashMap<u64, Question>>,
    /// For parcels with data, and for ranges.
    room: Semaphore,
    /// Whether summaries are of any use.
    compares: AtomicBool,
    /// Nothing differed of what was compared last: what comes next is asked about as one.
    alike: AtomicBool,
    /// Parts that were glimpsed at and differ.
    again: Mutex<Vec<Part>>,
}

impl Default for Questions {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            room: Semaphore::new(ROOM_MIB),
            compares: AtomicBool::new(true),
            alike: AtomicBool::new(false),
            again: Mutex::default(),
        }
    }
}

/// Parcels side by side whose summaries go together.
pub(super) struct Batch {
    parcels: Vec<Sending>,
    with_data: usize,
    most: usize,
    /// Parcels side by side that go as one, and how many of them have data.
    range: Vec<Glimpse>,
    range_with_data: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { parcels: Vec::new(), with_data: 0, most: 1, range: Vec::new(), range_with_data: 0 }
    }
}

impl Disk<'_> {
    /// Begins to ask about a parcel.
    pub(super) async fn ask(
        &self,
        sending: Sending,
        batch: &mut Batch,
    ) -> Result<(), MigrationError> {
        let compares =
            self.questions.compares.load(Ordering::Relaxed) && sending.parcel.part.is_whole();
        if compares && self.questions.alike.load(Ordering::Relaxed) {
            self.ask_batch(batch).await?;
            return self.add_to_range(Glimpse::of(sending.parcel), batch).await;
        }
        self.ask_range(batch).await?;
        let parcel = &sending.parcel;
        let has_data = !parcel.scan.pieces.is_empty();
        let room = room_of(parcel);
        if self.questions.room.try_acquire_many(room).map(SemaphorePermit::forget).is_err() {
            // What waits here must not be what is waited for.
            self.ask_batch(batch).await?;
            self.take_room(room).await?;
        }
        if !compares {
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

    async fn add_to_range(
        &self,
        glimpse: Glimpse,
        batch: &mut Batch,
    ) -> Result<(), MigrationError> {
        if batch.range.last().is_some_and(|last| {
            last.part.parcel + 1 != glimpse.part.parcel || batch.range.len() == MAX_SUMMARIES
        }) {
            self.ask_range(batch).await?;
        }
        batch.range_with_data += usize::from(glimpse.summary != Summary::Zeros);
        batch.range.push(glimpse);
        if batch.range_with_data >= RANGE_PARCELS {
            self.ask_range(batch).await?;
        }
        Ok(())
    }

    pub(super) async fn ask_range(&self, batch: &mut Batch) -> Result<(), MigrationError> {
        batch.range_with_data = 0;
        let range = std::mem::take(&mut batch.range);
        let Some(first) = range.first().map(|glimpse| glimpse.part.parcel) else { return Ok(()) };
        self.take_room(RANGE_ROOM).await?;
        let all: Vec<Summary> = range.iter().map(|glimpse| glimpse.summary).collect();
        let header = |item| BulkHeader::range(item, self.disk, first, &all);
        self.question(header, Bytes::new(), Question::Range(range)).await
    }

    /// Reads a part that differs again, and offers its pieces.
    pub(super) async fn ask_again(&self, part: Part) -> Result<(), MigrationError> {
        let parcel = part.read(|offset, len| self.view.read(offset, len)).await?;
        self.take_room(room_of(&parcel)).await?;
        self.ask_pieces(Sending { parcel, kept: None }).await
    }

    /// Waits for room, and takes it.
    async fn take_room(&self, room: u32) -> Result<(), MigrationError> {
        let permit = self.unless_lost(self.questions.room.acquire_many(room)).await?;
        permit.expect("the semaphore is never closed").forget();
        Ok(())
    }

    /// Returns once no parcel is under way: all room is free then.
    pub(super) async fn all_answered(&self) -> Result<(), MigrationError> {
        let all = self.questions.room.acquire_many(ROOM_MIB as u32);
        drop(self.unless_lost(all).await?.expect("the semaphore is never closed"));
        Ok(())
    }

    /// Parts that were glimpsed at and differ.
    pub(super) async fn take_again(&self) -> Vec<Part> {
        std::mem::take(&mut *self.questions.again.lock().await)
    }

    pub(super) async fn ask_batch(&self, batch: &mut Batch) -> Result<(), MigrationError> {
        batch.with_data = 0;
        let parcels = std::mem::take(&mut batch.parcels);
        let summaries = parcels.iter().map(|sending| sending.parcel.summary()).collect();
        let Some(first) = parcels.first().map(|first| first.parcel.part.parcel) else {
            return Ok(());
        };
        self.ask_summaries(first, summaries, Question::Summaries(parcels)).await
    }

    async fn ask_summaries(
        &self,
        first: u64,
        parcels: Vec<Summary>,
        question: Question,
    ) -> Result<(), MigrationError> {
        let body = Summaries { disk: self.disk, first, parcels }.encode();
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
        self.questions.open.lock().await.insert(item, question);
        self.sender.link.send_bulk(self.class, &header(item), body).await
    }

    /// Everything asked for is sent: what did not come together?
    pub(super) async fn end(&self) -> Result<(), MigrationError> {
        let item = self.sender.link.next_disk_item();
        let header = BulkHeader::End { item, disk: self.disk };
        self.sender.link.send_bulk(self.class, &header, Bytes::new()).await
    }

    /// Deals with answers until the disk has come together.
    pub(super) async fn hear(&self) -> Result<(), MigrationError> {
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
        let question = self.questions.open.lock().await.remove(&item);
        let decode = |count| {
            let answer = Answer::decode(wanted, count).map_err(|error| self.bad(error))?;
            Ok::<_, MigrationError>(answer.0)
        };
        if plain {
            self.questions.compares.store(false, Ordering::Relaxed);
        }
        match question {
            Some(Question::Range(range)) => {
                let differs = decode(1)? == [true];
                self.questions.alike.store(!differs, Ordering::Relaxed);
                if differs {
                    let first = range[0].part.parcel;
                    let summaries = range.iter().map(|glimpse| glimpse.summary).collect();
                    return self.ask_summaries(first, summaries, Question::Glimpses(range)).await;
                }
                range
                    .iter()
                    .for_each(|glimpse| self.is_known(glimpse.data_bytes, glimpse.zero_bytes));
                self.questions.room.add_permits(RANGE_ROOM as usize);
                Ok(())
            }
            Some(Question::Glimpses(glimpses)) => {
                let differs = decode(glimpses.len())?;
                let mut again = self.questions.again.lock().await;
                for (glimpse, differs) in glimpses.into_iter().zip(differs) {
                    if differs {
                        again.push(glimpse.part);
                    } else {
                        self.is_known(glimpse.data_bytes, glimpse.zero_bytes);
                    }
                }
                self.questions.room.add_permits(RANGE_ROOM as usize);
                Ok(())
            }
            Some(Question::Summaries(parcels)) => {
                let differs = decode(parcels.len())?;
                self.questions.alike.store(!differs.contains(&true), Ordering::Relaxed);
                // What is known makes room before anything waits for the link.
                for (sending, _) in parcels.iter().zip(&differs).filter(|(_, differs)| !**differs) {
                    let parcel = &sending.parcel;
                    self.is_known(parcel.data_bytes(), parcel.zero_bytes());
                    self.questions.room.add_permits(room_of(parcel) as usize);
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
    fn is_known(&self, data_bytes: u64, zero_bytes: u64) {
        self.sender.meter.disk_known(data_bytes);
        self.sender.meter.disk_zero(zero_bytes);
    }

    /// All that was wanted of a parcel is sent.
    fn is_done(&self, sending: Sending) {
        drop(sending.kept);
        self.questions.room.add_permits(room_of(&sending.parcel) as usize);
    }
}

/// The part of [`ROOM_MIB`] that a parcel takes: none if it has no data, of which nothing is held.
fn room_of(parcel: &Parcel) -> u32 {
    parcel.data_bytes().div_ceil(1 << 20) as u32
}
