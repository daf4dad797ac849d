//! What lies at this host and may be part of what arrives: pieces and blocks of the arriving images
//! themselves, kept in memory, and of others beside them, found by the index.
//!
//! Invariant: everything in here is a hint. What is given out was read just now; whoever uses it
//! compares hashes, and a piece is written only by its whole id.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use longhaul_dedup::blocks::{BLOCK_BYTES, Scan, ShortId, hash_blocks};
use longhaul_dedup::grains::GrainId;
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::index::{ChunkIndex, Insertion, Location};
use longhaul_dedup::pages::PageHash;
use longhaul_dedup::patch::Base;
use longhaul_dedup::places::{Place, Snapshot, block_key, piece_key};
use longhaul_dedup::recipe::{Claim, Claims, GrainSample, Recipe, RecipeEntry, RecipeLog, Sample};

use super::assemble::Slot;
use super::receive::Disk;
use crate::hypervisor::ImageFile;
use crate::hypervisor::spec::ImageFormat;

/// Memory for the index of pieces that lie here: more than 1 M pieces of 64 KiB.
const PIECES_BYTES_MAX: usize = 64 << 20;
/// Memory for the index of blocks that lie here: as many blocks, one of 16.
const SAMPLES_BYTES_MAX: usize = 64 << 20;
/// Memory for the index of grains that lie here: as many samples, one for each 10 KiB.
const GRAINS_BYTES_MAX: usize = 64 << 20;
/// What is read at once to look at a block: its neighbours are looked at next.
const WINDOW_BYTES: u64 = 256 << 10;
/// Windows that are kept.
const WINDOWS_MAX: usize = 64;
/// Places that are kept to look beside, the last one found first.
const SHIFTS_MAX: usize = 4;
/// Places that the grains of one piece are named of.
const BASES_MAX: usize = 2;
/// Bytes around the place of a missing block that belong to its base: what is similar moves by some
/// bytes within a stretch.
const BASE_MARGIN: u64 = 1024;

/// From a place of what arrives to the place of the same bytes in an image that lies here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shift {
    image: u16,
    bytes: i64,
}

impl Shift {
    pub(super) fn of(offset: u64, found: &Location) -> Self {
        Self { image: found.image, bytes: found.offset.wrapping_sub(offset).cast_signed() }
    }

    /// Whether what lies there overlaps widely with what lies at the other.
    fn is_near(self, other: Self) -> bool {
        self.image == other.image && self.bytes.abs_diff(other.bytes) <= 2 * BASE_MARGIN
    }

    fn of_place(self, offset: u64) -> Option<(u16, u64)> {
        Some((self.image, offset.checked_add_signed(self.bytes)?))
    }
}

/// An image beside those that arrive.
struct Other {
    path: PathBuf,
    bytes: u64,
}

/// A part of an image, as it was read.
struct Window {
    image: u16,
    offset: u64,
    data: Bytes,
    hashes: Vec<PageHash>,
}

/// The images that lie here, and what is known of them.
pub(super) struct Finder {
    pieces: ChunkIndex,
    samples: ChunkIndex,
    grains: ChunkIndex,
    arriving: usize,
    others: Vec<Other>,
    /// What the images beside hold.
    places: Snapshot,
    /// The images' numbers here, by those that the index gives them.
    numbers: HashMap<u16, u16>,
    windows: VecDeque<Window>,
    /// Of arriving disks that begin as another image: the number of that.
    begin_as: HashMap<u16, u16>,
}

/// A short id as the index has it: it looks at no more than the first 8 bytes.
fn key(id: &[u8]) -> ChunkId {
    let mut bytes = [0; ChunkId::BYTES];
    bytes[..id.len()].copy_from_slice(id);
    ChunkId::from_bytes(bytes)
}

impl Finder {
    /// Knows nothing yet of `arriving` disks, and of others what the index tells.
    pub(super) fn new(arriving: usize, places: Snapshot) -> Self {
        let mut others = Vec::new();
        let mut numbers = HashMap::new();
        for (number, image) in places.numbered() {
            let Ok(here) = u16::try_from(arriving + others.len()) else { break };
            numbers.insert(number, here);
            others.push(Other { path: image.path.clone(), bytes: image.bytes });
        }
        Self {
            pieces: ChunkIndex::with_budget(PIECES_BYTES_MAX),
            samples: ChunkIndex::with_budget(SAMPLES_BYTES_MAX),
            grains: ChunkIndex::with_budget(GRAINS_BYTES_MAX),
            arriving,
            others,
            places,
            numbers,
            windows: VecDeque::new(),
            begin_as: HashMap::new(),
        }
    }

    /// An arriving disk begins as this image. Returns whether that is one of those known here.
    pub(super) fn begins_as(&mut self, number: u16, image: &Path) -> bool {
        let Some(other) = self.others.iter().position(|other| other.path == image) else {
            return false;
        };
        self.begin_as.insert(number, (self.arriving + other) as u16);
        true
    }

    /// Where what is found in an image stays: in the one that it begins as, if it does.
    fn lasting(&self, image: u16) -> u16 {
        *self.begin_as.get(&image).unwrap_or(&image)
    }

    /// From a place of what arrives to where it was found.
    pub(super) fn shift(&self, offset: u64, found: Location) -> Shift {
        Shift::of(offset, &Location { image: self.lasting(found.image), ..found })
    }

    /// Takes in what a record says of an arriving disk.
    pub(super) fn add(&mut self, number: u16, recipe: &Recipe) {
        for entry in recipe.entries() {
            self.add_piece(number, &entry);
        }
        self.add_samples(number, recipe.samples());
        self.add_grains(number, recipe.grains());
    }

    /// Takes in the grains of the images that the index tells of, from their records: as many as there
    /// is memory for.
    pub(super) fn add_grains_of_others(&mut self) {
        for other in 0..self.others.len() {
            let number = (self.arriving + other) as u16;
            let record = File::open(RecipeLog::path_for(&self.others[other].path)).ok();
            let record = record.map(|file| BufReader::with_capacity(1 << 20, file));
            let Some(claims) = record.and_then(|record| Claims::read(record).ok()) else {
                continue;
            };
            for claim in claims.map_while(Result::ok) {
                if let Claim::Grain(grain) = claim
                    && self.add_grain(number, &grain) == Insertion::Full
                {
                    return;
                }
            }
        }
    }

    /// Takes in an image beside those that arrive, by its record.
    pub(super) fn add_other(&mut self, image: &ImageFile) {
        // Only raw images are copied from in place; others would need a process each.
        if image.format != ImageFormat::Raw {
            return;
        }
        let Ok(number) = u16::try_from(self.arriving + self.others.len()) else { return };
        // A record that cannot be read is one source less, not a failure.
        match RecipeLog::load(&RecipeLog::path_for(&image.path)) {
            Ok(recipe) => {
                self.add(number, &recipe);
                self.others.push(Other { path: image.path.clone(), bytes: recipe.image_bytes() });
            }
            Err(error) => {
                tracing::debug!(image = %image.path.display(), %error, "not copied from");
            }
        }
    }

    /// An image holds this piece.
    pub(super) fn add_piece(&mut self, number: u16, entry: &RecipeEntry) {
        let location = Location { image: number, offset: entry.offset, len: entry.len };
        self.pieces.insert(&entry.id, location);
    }

    /// An image holds these blocks.
    pub(super) fn add_samples(&mut self, number: u16, samples: impl Iterator<Item = Sample>) {
        for sample in samples {
            let len = BLOCK_BYTES as u32;
            let location = Location { image: number, offset: sample.offset, len };
            self.samples.insert(&key(sample.id.as_bytes()), location);
        }
    }

    /// An image holds these grains.
    pub(super) fn add_grains(&mut self, number: u16, grains: impl Iterator<Item = GrainSample>) {
        for grain in grains {
            self.add_grain(number, &grain);
        }
    }

    fn add_grain(&mut self, number: u16, grain: &GrainSample) -> Insertion {
        // Its length is not asked for; none would be an empty place.
        let location = Location { image: number, offset: grain.offset, len: 1 };
        self.grains.insert(&key(grain.id.as_bytes()), location)
    }

    /// An image was read, and this was found.
    pub(super) fn add_scan(&mut self, number: u16, scan: &Scan) {
        for piece in &scan.pieces {
            self.add_piece(number, &piece.entry());
        }
        self.add_samples(number, scan.samples());
    }

    /// Whether blocks can be found at all, but for the same place.
    pub(super) fn has_blocks(&self) -> bool {
        !self.samples.is_empty() || !self.places.is_empty()
    }

    /// What the index has for each of these hashes. It may have to read.
    async fn places(&self, keys: Vec<u64>) -> Vec<Vec<Place>> {
        if self.places.is_empty() || keys.is_empty() {
            return vec![Vec::new(); keys.len()];
        }
        let places = self.places.clone();
        let looking = tokio::task::spawn_blocking(move || {
            keys.into_iter().map(|key| places.lookup(key)).collect()
        });
        looking.await.expect("looking into the index does not panic")
    }

    /// Where a place of the index is, by the numbers here.
    fn located(&self, place: &Place, len: u32) -> Option<Location> {
        let image = *self.numbers.get(&place.image)?;
        Some(Location { image, offset: place.offset, len })
    }

    /// Where the index has the sampled ones of these blocks.
    async fn sampled(&self, ids: &[ShortId]) -> HashMap<ShortId, Vec<(u16, u64)>> {
        let sampled: Vec<ShortId> = ids.iter().copied().filter(|id| id.is_sampled()).collect();
        let places = self.places(sampled.iter().copied().map(block_key).collect()).await;
        let located = places.into_iter().map(|places| {
            let blocks = places.iter().filter(|place| place.blocks == 0);
            let located = blocks.filter_map(|place| self.located(place, BLOCK_BYTES as u32));
            located.map(|found| (found.image, found.offset)).collect()
        });
        sampled.into_iter().zip(located).collect()
    }

    /// Places where a piece may be.
    pub(super) async fn pieces(&self, entry: &RecipeEntry) -> Vec<Location> {
        let of_length = self.pieces.lookup(&entry.id).filter(|found| found.len == entry.len);
        let mut found: Vec<Location> = of_length.collect();
        let places = self.places(vec![piece_key(&entry.id)]).await;
        let places = places.iter().flatten();
        let like = places.filter(|place| usize::from(place.blocks) == entry.blocks());
        found.extend(like.filter_map(|place| self.located(place, entry.len)));
        found
    }

    /// A piece is not where it was said to be. What the index says stays until its image is read anew.
    pub(super) fn forget(&mut self, id: &ChunkId, location: &Location) {
        self.pieces.forget(id, location);
    }

    /// This part of an arriving disk was written.
    pub(super) fn written(&mut self, number: u16, range: &Range<u64>) {
        self.windows.retain(|window| {
            let end = window.offset + window.data.len() as u64;
            window.image != number || window.offset >= range.end || end <= range.start
        });
    }

    /// Reads a part of an image; nothing if that cannot be read.
    pub(super) async fn read(
        &self,
        disks: &[Disk],
        image: u16,
        offset: u64,
        len: u32,
    ) -> Option<Bytes> {
        let number = usize::from(image);
        if let Some(disk) = disks.get(number) {
            return disk.image.read(offset, len).await.ok();
        }
        let path = self.others.get(number - disks.len())?.path.clone();
        let len = len as usize;
        let reading = tokio::task::spawn_blocking(move || {
            use std::os::unix::fs::FileExt;
            let mut data = vec![0; len];
            File::open(path).ok()?.read_exact_at(&mut data, offset).ok()?;
            Some(Bytes::from(data))
        });
        reading.await.ok()?
    }

    fn image_bytes(&self, disks: &[Disk], image: u16) -> Option<u64> {
        let number = usize::from(image);
        match disks.get(number) {
            Some(disk) => Some(disk.info.bytes),
            None => Some(self.others.get(number - disks.len())?.bytes),
        }
    }

    /// The block of `len` bytes at a place, if its short id is `id`.
    async fn block_at(
        &mut self,
        disks: &[Disk],
        (image, offset): (u16, u64),
        id: ShortId,
        len: usize,
    ) -> Option<(PageHash, Bytes)> {
        if !offset.is_multiple_of(BLOCK_BYTES as u64) {
            return None;
        }
        let start = offset - offset % WINDOW_BYTES;
        let known = self.windows.iter().position(|w| w.image == image && w.offset == start);
        let at = match known {
            Some(at) => at,
            None => {
                let bytes = self.image_bytes(disks, image)?;
                let window_len = bytes.checked_sub(start)?.min(WINDOW_BYTES);
                if offset >= bytes {
                    return None;
                }
                let data = self.read(disks, image, start, window_len as u32).await?;
                let hashes = hash_blocks(&data);
                if self.windows.len() == WINDOWS_MAX {
                    self.windows.pop_front();
                }
                self.windows.push_back(Window { image, offset: start, data, hashes });
                self.windows.len() - 1
            }
        };
        let window = &self.windows[at];
        let block = ((offset - start) / BLOCK_BYTES as u64) as usize;
        let hash = window.hashes.get(block).filter(|hash| ShortId::of(hash) == id)?;
        let begin = block * BLOCK_BYTES;
        let content = &window.data[begin..window.data.len().min(begin + BLOCK_BYTES)];
        // A copy of its own: it must not keep the whole window in memory.
        (content.len() == len).then(|| (*hash, Bytes::copy_from_slice(content)))
    }

    /// Looks for the blocks of a piece: at their own place, then by the index, then beside what was
    /// found. `shifts` says where the pieces around it were found, and then where blocks of it were.
    pub(super) async fn blocks(
        &mut self,
        disks: &[Disk],
        number: u16,
        entry: &RecipeEntry,
        ids: &[ShortId],
        shifts: &mut Vec<Shift>,
    ) -> Vec<Slot> {
        let mut slots = vec![Slot::Missing; ids.len()];
        let place = |block: usize| entry.offset + (block * BLOCK_BYTES) as u64;
        let fresh = disks[usize::from(number)].fresh;
        let sampled = self.sampled(ids).await;
        for block in 0..ids.len() {
            let (id, len_here) = (ids[block], entry.block_len(block));
            if !fresh {
                let here = self.block_at(disks, (number, place(block)), id, len_here).await;
                if let Some((hash, _)) = here {
                    slots[block] = Slot::InPlace(hash);
                    continue;
                }
            }
            let mut places: Vec<(u16, u64)> = Vec::new();
            if id.is_sampled() {
                let found = self.samples.lookup(&key(id.as_bytes()));
                places.extend(found.map(|found| (found.image, found.offset)));
                places.extend(sampled.get(&id).into_iter().flatten());
            }
            places.extend(shifts.iter().filter_map(|shift| shift.of_place(place(block))));
            for (image, offset) in places {
                let found = self.block_at(disks, (image, offset), id, len_here).await;
                let Some((hash, data)) = found else { continue };
                slots[block] = Slot::Here(hash, data);
                let location = Location { image, offset, len: BLOCK_BYTES as u32 };
                let shift = Shift::of(place(block), &location);
                shifts.retain(|known| *known != shift);
                shifts.insert(0, shift);
                shifts.truncate(SHIFTS_MAX);
                // What lies before it may be the same as well.
                for before in (0..block).rev() {
                    let Some(there) = shift.of_place(place(before)) else { break };
                    if slots[before] != Slot::Missing {
                        break;
                    }
                    let found =
                        self.block_at(disks, there, ids[before], entry.block_len(before)).await;
                    let Some((hash, data)) = found else { break };
                    slots[before] = Slot::Here(hash, data);
                }
                break;
            }
        }
        slots
    }

    /// What seems to be similar to the missing blocks of a piece: where samples of its grains are (each
    /// with its place in the piece), or what lies beside its found blocks.
    pub(super) async fn base(
        &self,
        disks: &[Disk],
        number: u16,
        entry: &RecipeEntry,
        (slots, samples): (&[Slot], &[(u64, GrainId)]),
        shifts: &[Shift],
    ) -> Option<Base> {
        let mut places: Vec<(Shift, usize)> = Vec::new();
        for (at, id) in samples {
            for found in self.grains.lookup(&key(id.as_bytes())) {
                let shift = Shift::of(entry.offset + at, &found);
                match places.iter_mut().find(|(known, _)| known.is_near(shift)) {
                    Some((_, count)) => *count += 1,
                    None => places.push((shift, 1)),
                }
            }
        }
        places.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        // A piece that was partly overwritten is most like what it was.
        let here = Shift { image: self.lasting(number), bytes: 0 };
        let in_place = slots.iter().any(|slot| matches!(slot, Slot::InPlace(_))).then_some(here);
        let mut chosen: Vec<Shift> = Vec::new();
        let found = places.into_iter().map(|(shift, _)| shift);
        for shift in in_place.into_iter().chain(found).chain(shifts.iter().copied()) {
            if chosen.len() < BASES_MAX && !chosen.iter().any(|known| known.is_near(shift)) {
                chosen.push(shift);
            }
        }
        let mut stretches = Vec::new();
        for shift in chosen {
            for range in self.around_missing(disks, entry, slots, shift) {
                let len = (range.end - range.start) as u32;
                stretches.extend(self.read(disks, shift.image, range.start, len).await);
            }
        }
        let base = Base::of(&stretches);
        (!base.is_empty()).then_some(base)
    }

    /// Where what lies around the missing blocks of a piece would be at a shift.
    fn around_missing(
        &self,
        disks: &[Disk],
        entry: &RecipeEntry,
        slots: &[Slot],
        shift: Shift,
    ) -> Vec<Range<u64>> {
        let Some(end) = self.image_bytes(disks, shift.image) else { return Vec::new() };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (block, _) in slots.iter().enumerate().filter(|(_, slot)| **slot == Slot::Missing) {
            let place = entry.offset + (block * BLOCK_BYTES) as u64;
            let Some((_, there)) = shift.of_place(place) else { continue };
            let stop = end.min(there + entry.block_len(block) as u64 + BASE_MARGIN);
            let start = there.saturating_sub(BASE_MARGIN);
            match ranges.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(stop),
                _ if start < stop => ranges.push(start..stop),
                _ => {}
            }
        }
        ranges
    }
}
