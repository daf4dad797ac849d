//! The receiving half: answers offers from what lies here, checks chunks, writes images.
//!
//! Invariant: every item is checked against the disk's bounds before anything is done with it; a
//! place in an image is believed to hold a chunk only after it was read and hashed.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use longhaul_dedup::bundle::{BundlePart, ChunkBundle};
use longhaul_dedup::chunk;
use longhaul_dedup::chunker::{self, ZERO_GRANULARITY};
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::index::{ChunkIndex, Location};
use longhaul_dedup::offer::{Offer, Want};
use longhaul_dedup::recipe::{ImageIdentity, RecipeEntry, RecipeError, RecipeLog};

use super::super::error::MigrationError;
use super::super::message::{BulkHeader, ToSource};
use crate::hypervisor::spec::ImageFormat;
use crate::hypervisor::{DiskImage, DiskInfo, ImageFile, IncomingDisk};

/// Memory for the index of what lies here: more than 1 M chunks of 80 KiB.
const INDEX_BYTES_MAX: usize = 64 << 20;
/// Chunks that are waited for at several places; beyond it a repeated chunk is asked for again.
const WAITING_MAX: usize = 1 << 16;
/// Written bytes that are made durable at once: a round that ends with a gigabyte in the page cache
/// would hold up whoever waits for its end.
const FLUSH_BYTES: u64 = 64 << 20;
/// Payload in one bundle that is believed.
const BUNDLE_PAYLOAD_MAX: usize = 8 << 20;

struct Disk {
    info: DiskInfo,
    image: Box<dyn DiskImage>,
    log: RecipeLog,
    path: PathBuf,
    /// What the log says, to be checked before it is believed.
    recorded: HashSet<(u64, u32, ChunkId)>,
    /// Nothing but zeros was there: zeros need not be written in the first round.
    fresh: bool,
}

/// Receives the disks of one attempt.
pub(in super::super) struct DiskReceiver {
    peer: String,
    disks: Vec<Disk>,
    /// Images beside those that arrive, to copy from; opened when first needed.
    others: Vec<ImageFile>,
    index: ChunkIndex,
    /// Places that want a chunk which is already on its way for another one.
    waiting: HashMap<ChunkId, Vec<(u16, u64)>>,
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
        known: Vec<ImageFile>,
    ) -> Result<Self, MigrationError> {
        let mut index = ChunkIndex::with_budget(INDEX_BYTES_MAX);
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
            let mut recorded = HashSet::new();
            for entry in log.recipe().entries() {
                recorded.insert((entry.offset, entry.len, entry.id));
                let location =
                    Location { image: number as u16, offset: entry.offset, len: entry.len };
                index.insert(&entry.id, location);
            }
            disks.push(Disk {
                info,
                image: incoming.image,
                log,
                path: incoming.path,
                recorded,
                fresh: incoming.fresh,
            });
        }
        let mut others = Vec::new();
        for image in known {
            // Only raw images are copied from in place; others would need a process each.
            let arriving = disks.iter().any(|disk| disk.path == image.path);
            if image.format != ImageFormat::Raw || arriving {
                continue;
            }
            let Ok(number) = u16::try_from(disks.len() + others.len()) else { break };
            // A record that cannot be read is one source less, not a failure.
            match RecipeLog::load(&RecipeLog::path_for(&image.path)) {
                Ok(recipe) => {
                    for entry in recipe.entries() {
                        let location =
                            Location { image: number, offset: entry.offset, len: entry.len };
                        index.insert(&entry.id, location);
                    }
                    others.push(image);
                }
                Err(error) => {
                    tracing::debug!(image = %image.path.display(), %error, "not copied from");
                }
            }
        }
        let peer = peer.to_owned();
        Ok(Self { peer, disks, others, index, waiting: HashMap::new(), items: 0, unflushed: 0 })
    }

    /// Items applied so far.
    pub(in super::super) fn items(&self) -> u64 {
        self.items
    }

    /// Whether a disk is, untouched, what it was when the seed of `generation` was kept.
    pub(in super::super) fn is_at(&self, disk: usize, generation: u64) -> bool {
        let disk = &self.disks[disk];
        disk.log.complete().is_some_and(|kept| {
            kept.generation == generation && identity(&disk.path).is_ok_and(|now| now == kept.image)
        })
    }

    /// A round is over: from here on zeros overwrite something, and what was written is made
    /// durable now, so that little is left to do while the guest is paused.
    pub(in super::super) async fn round_done(&mut self) -> Result<(), MigrationError> {
        for disk in &mut self.disks {
            disk.fresh = false;
        }
        self.flush().await
    }

    /// Applies an item; an offer has an answer.
    pub(in super::super) async fn apply(
        &mut self,
        header: &BulkHeader,
        body: Bytes,
    ) -> Result<Option<ToSource>, MigrationError> {
        let answer = match *header {
            BulkHeader::Offer { item } => {
                let offer = Offer::decode(&body).map_err(|error| self.bad(error))?;
                let want = self.answer(&offer).await?;
                Some(ToSource::Want { item, wanted: want.encode().to_vec() })
            }
            BulkHeader::Chunks { .. } => {
                self.write_bundle(body).await?;
                None
            }
            BulkHeader::Memory { .. } => {
                return Err(self.bad("memory among the disk items"));
            }
        };
        self.items += 1;
        Ok(answer)
    }

    async fn answer(&mut self, offer: &Offer) -> Result<Want, MigrationError> {
        self.check_disk(offer.disk)?;
        let mut wants = Vec::with_capacity(offer.entries.len());
        for entry in &offer.entries {
            self.check_range(offer.disk, entry.offset, u64::from(entry.len))?;
            wants.push(!self.find(offer.disk, entry).await?);
        }
        let mut wants = wants.into_iter();
        Ok(Want::answer(offer, |_| wants.next().unwrap_or(true)))
    }

    /// Whether the chunk is in place now, or will be when one that is on its way arrives.
    async fn find(&mut self, number: u16, entry: &RecipeEntry) -> Result<bool, MigrationError> {
        let disk = &self.disks[usize::from(number)];
        if disk.recorded.contains(&(entry.offset, entry.len, entry.id)) {
            let there = disk.image.read(entry.offset, entry.len).await?;
            if chunk::verify(entry.id, there).is_ok() {
                return Ok(true);
            }
        }
        let locations: Vec<Location> = self.index.lookup(&entry.id).collect();
        for location in locations {
            if location.len != entry.len {
                continue;
            }
            if let Some(data) = self.read_location(&location).await
                && let Ok(found) = chunk::verify(entry.id, data)
            {
                self.write(number, entry.offset, entry.id, found.into_data()).await?;
                return Ok(true);
            }
            // Changed since: nothing is lost but this hint.
            self.index.forget(&entry.id, &location);
        }
        if let Some(places) = self.waiting.get_mut(&entry.id) {
            if places.len() < WAITING_MAX {
                places.push((number, entry.offset));
                return Ok(true);
            }
        } else if self.waiting.len() < WAITING_MAX {
            self.waiting.insert(entry.id, Vec::new());
        }
        Ok(false)
    }

    async fn read_location(&self, location: &Location) -> Option<Bytes> {
        let number = usize::from(location.image);
        if let Some(disk) = self.disks.get(number) {
            return disk.image.read(location.offset, location.len).await.ok();
        }
        let path = self.others.get(number - self.disks.len())?.path.clone();
        let (offset, len) = (location.offset, location.len as usize);
        tokio::task::spawn_blocking(move || {
            use std::os::unix::fs::FileExt;
            let mut data = vec![0; len];
            std::fs::File::open(path).ok()?.read_exact_at(&mut data, offset).ok()?;
            Some(Bytes::from(data))
        })
        .await
        .ok()?
    }

    async fn write_bundle(&mut self, body: Bytes) -> Result<(), MigrationError> {
        let decoding =
            tokio::task::spawn_blocking(move || ChunkBundle::decode(&body, BUNDLE_PAYLOAD_MAX));
        let bundle = decoding.await.expect("decoding does not panic");
        let bundle = bundle.map_err(|error| self.bad(error))?;
        let number = bundle.disk;
        self.check_disk(number)?;
        for part in bundle.parts {
            let range = part.range();
            self.check_range(number, range.start, range.end - range.start)?;
            match part {
                BundlePart::Zero { offset, len } => {
                    let disk = &mut self.disks[usize::from(number)];
                    if !disk.fresh {
                        disk.log.void([range]).map_err(recipe_error)?;
                        disk.image.zero(offset, len).await?;
                    }
                }
                BundlePart::Chunk { offset, chunk } => {
                    let (id, data) = (chunk.id(), chunk.into_data());
                    self.write(number, offset, id, data.clone()).await?;
                    for (other, offset) in self.waiting.remove(&id).unwrap_or_default() {
                        // Its range was checked when it was offered, with this id.
                        self.check_range(other, offset, data.len() as u64)?;
                        self.write(other, offset, id, data.clone()).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes a checked chunk, zeros within it as holes, and records it.
    async fn write(
        &mut self,
        number: u16,
        offset: u64,
        id: ChunkId,
        data: Bytes,
    ) -> Result<(), MigrationError> {
        let disk = &mut self.disks[usize::from(number)];
        for (range, zero) in chunker::split_zero_runs(&data, ZERO_GRANULARITY) {
            let at = offset + range.start as u64;
            match (zero, disk.fresh) {
                (true, true) => {}
                (true, false) => disk.image.zero(at, range.len() as u64).await?,
                (false, _) => disk.image.write(at, data.slice(range)).await?,
            }
        }
        let entry = RecipeEntry { offset, len: data.len() as u32, id };
        disk.log.append(&[entry]).map_err(recipe_error)?;
        let location = Location { image: number, offset, len: entry.len };
        self.index.insert(&id, location);
        self.unflushed += data.len() as u64;
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
            let identity = identity(&disk.path).map_err(|source| MigrationError::Io {
                doing: format!("looking at {}", disk.path.display()),
                source,
            })?;
            disk.log.mark_complete(generation, identity).map_err(recipe_error)?;
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

/// By what an image is recognised as untouched.
fn identity(image: &Path) -> std::io::Result<ImageIdentity> {
    Ok(ImageIdentity::of(&std::fs::metadata(image)?))
}

fn recipe_error(error: RecipeError) -> MigrationError {
    MigrationError::Io {
        doing: "keeping the record of what an image holds".into(),
        source: std::io::Error::other(error),
    }
}
