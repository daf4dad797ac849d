//! How fast one core cuts, hashes and looks up an image, beside FastCDC alone and BLAKE3 alone.
//!
//! Invariant: all of a row is measured in one run on the same bytes in memory, by processor time of the one
//! thread that does it, best of [`PASSES`]; nothing in it reads an image.

use std::hint::black_box;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use bytes::Bytes;
use clap::Args;
use fastcdc::v2020::FastCDC;
use longhaul_dedup::blocks::{self, PARCEL_BYTES, Piece, Scan};
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::index::{ChunkIndex, Location};
use longhaul_dedup::places::{Places, Snapshot, Wanted, block_key, piece_key};
use longhaul_dedup::recipe::ImageIdentity;
use serde::{Deserialize, Serialize};

use super::coding::timed;
use super::image::Image;
use super::{Pair, checksum};
use crate::row::{self, Made, Revision};

/// Passes over the image, of which the fastest counts.
const PASSES: usize = 5;
/// Average piece that all of them cut.
const PIECE_BYTES: usize = 64 << 10;
/// As much as the engine's receiver allows each of its two indexes.
const INDEX_BUDGET_BYTES: usize = 64 << 20;

/// What to measure.
#[derive(Debug, Args)]
pub struct SpeedPlan {
    #[command(flatten)]
    pair: Pair,
    /// Where the index of the old image may lie.
    #[arg(long)]
    work: PathBuf,
}

/// One pair on one core.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// The pair's name.
    pub pair: String,
    /// SHA-256 of the image that is indexed, as its build printed it; empty if it did not.
    pub old_sha256: String,
    /// The same of the image that is cut.
    pub new_sha256: String,
    /// Bytes that are cut: those of the new image that are not zeros.
    pub data_bytes: u64,
    /// Places in the index of the old image.
    pub entries: u64,
    /// Pieces and blocks that are looked up.
    pub lookups: u64,
    /// Seconds of FastCDC alone, pieces of 64 KiB on average.
    pub fastcdc_s: f64,
    /// Seconds of BLAKE3 alone, 64 KiB at a time.
    pub blake3_s: f64,
    /// Seconds of the engine to cut and hash.
    pub cut_s: f64,
    /// The same, and to look up all in the index that is held in memory.
    pub in_memory_s: f64,
    /// The same in the index on disk, which is in the page cache.
    pub on_disk_s: f64,
}

impl Row {
    /// The engine's speed by that of the slower of FastCDC and BLAKE3: with the index in memory, and on disk.
    pub fn ratios(&self) -> [f64; 2] {
        let slower = self.fastcdc_s.max(self.blake3_s);
        [slower / self.in_memory_s, slower / self.on_disk_s]
    }
}

/// Measures a pair and appends a row.
///
/// # Errors
///
/// When an image cannot be read, the index not be built or the row not be written.
pub fn run(plan: &SpeedPlan) -> Result<()> {
    let (old, new) = plan.pair.read()?;
    let (old, new) = (parcels(&old), parcels(&new));
    let data_bytes = new.iter().map(|(_, data)| data.len() as u64).sum();
    let indexes = Indexes::of(&old, plan)?;
    let mut lookups = 0;
    let row = Row {
        made: Made::now(&Revision::current()?)?,
        pair: plan.pair.name.clone(),
        old_sha256: checksum(&plan.pair.old),
        new_sha256: checksum(&plan.pair.new),
        data_bytes,
        entries: indexes.entries,
        fastcdc_s: best(&new, |data| {
            let cuts = FastCDC::new(data, PIECE_BYTES / 4, PIECE_BYTES, PIECE_BYTES * 4);
            cuts.map(|cut| cut.length).sum::<usize>()
        }),
        blake3_s: best(&new, |data| {
            data.chunks(PIECE_BYTES)
                .map(|chunk| usize::from(blake3::hash(chunk).as_bytes()[0]))
                .sum()
        }),
        cut_s: best(&new, |data| scan(data).pieces.len()),
        in_memory_s: best(&new, |data| indexes.look_in_memory(&scan(data))),
        on_disk_s: best(&new, |data| {
            let scan = scan(data);
            lookups += (scan.pieces.len() + scan.samples().count()) as u64;
            indexes.look_on_disk(&scan)
        }),
        lookups: lookups / PASSES as u64,
    };
    let gb_per_s = |seconds: f64| data_bytes as f64 / seconds / 1e9;
    let [in_memory, on_disk] = row.ratios();
    eprintln!(
        "GB/s of one core: FastCDC {:.2}, BLAKE3 {:.2}; engine: cut and hashed {:.2}, looked up in memory {:.2}, on disk {:.2}: \
         {in_memory:.2} and {on_disk:.2} of the slower",
        gb_per_s(row.fastcdc_s),
        gb_per_s(row.blake3_s),
        gb_per_s(row.cut_s),
        gb_per_s(row.in_memory_s),
        gb_per_s(row.on_disk_s)
    );
    row::append(&plan.pair.results, &row)
}

/// An image's data as the engine has it: by parcels, each in memory of its own.
fn parcels(image: &Image) -> Vec<(u64, Bytes)> {
    let parcels = image.data().chunks(PARCEL_BYTES as usize).map(Bytes::copy_from_slice);
    (0..).step_by(PARCEL_BYTES as usize).zip(parcels).collect()
}

fn scan(data: &Bytes) -> Scan {
    blocks::scan(&[(0, data.clone())])
}

/// Seconds of processor time for all parcels, in the fastest pass.
fn best(parcels: &[(u64, Bytes)], mut work: impl FnMut(&Bytes) -> usize) -> f64 {
    let mut pass =
        || timed(|| black_box(parcels.iter().map(|(_, data)| work(data)).sum::<usize>())).1;
    (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min)
}

/// The old image in both kinds of index.
struct Indexes {
    pieces: ChunkIndex,
    samples: ChunkIndex,
    on_disk: Snapshot,
    entries: u64,
    _places: (Places, tempfile::TempDir),
}

impl Indexes {
    fn of(old: &[(u64, Bytes)], plan: &SpeedPlan) -> Result<Self> {
        let folder = tempfile::tempdir_in(&plan.work)?;
        let places = Places::open(folder.path())?;
        let mut pieces = ChunkIndex::with_budget(INDEX_BUDGET_BYTES);
        let mut samples = ChunkIndex::with_budget(INDEX_BUDGET_BYTES);
        let mut builder = places.builder();
        for (offset, data) in old {
            let scan = blocks::scan(&[(*offset, data.clone())]);
            for piece in scan.pieces.iter().map(Piece::entry) {
                let place = Location { image: 0, offset: piece.offset, len: piece.len };
                pieces.insert(&piece.id, place);
            }
            for sample in scan.samples() {
                let place = Location { image: 0, offset: sample.offset, len: 4096 };
                samples.insert(&short(block_key(sample.id)), place);
            }
            builder.add_scan(&scan)?;
        }
        let identity = ImageIdentity { size: 0, mtime_ns: 0, inode: 0 };
        let bytes = old.last().map_or(0, |(offset, data)| offset + data.len() as u64);
        places.finish(
            builder,
            Wanted { path: plan.pair.old.clone(), bytes, identity, record: None },
        )?;
        let on_disk = places.snapshot();
        let entries = on_disk.summary().entries;
        ensure!(entries > 0, "the old image has nothing to look for");
        Ok(Self { pieces, samples, on_disk, entries, _places: (places, folder) })
    }

    /// Looks all of a scan up; says how much of it is there.
    fn look_in_memory(&self, scan: &Scan) -> usize {
        let is_there = |piece: &&Piece| self.pieces.lookup(&piece.id).next().is_some();
        let samples = scan
            .samples()
            .filter(|sample| self.samples.lookup(&short(block_key(sample.id))).next().is_some());
        scan.pieces.iter().filter(is_there).count() + samples.count()
    }

    /// The same on disk.
    fn look_on_disk(&self, scan: &Scan) -> usize {
        let is_there = |piece: &&Piece| !self.on_disk.lookup(piece_key(&piece.id)).is_empty();
        let samples =
            scan.samples().filter(|sample| !self.on_disk.lookup(block_key(sample.id)).is_empty());
        scan.pieces.iter().filter(is_there).count() + samples.count()
    }
}

/// A short id as the index in memory has it: it looks at no more than the first 8 bytes.
fn short(key: u64) -> ChunkId {
    let mut bytes = [0; ChunkId::BYTES];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    ChunkId::from_bytes(bytes)
}
