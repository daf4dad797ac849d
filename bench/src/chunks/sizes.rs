//! What a look-up in the index of images costs, by its size; how fast it is built, and in how much memory.
//!
//! Invariant: the index is the product's own, with made-up ids in it, as spread as hashes are; each size is
//! built anew in a folder that is gone afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use longhaul_dedup::id::ChunkId;
use longhaul_dedup::places::{Places, Snapshot, Wanted, piece_key};
use longhaul_dedup::recipe::{ImageIdentity, RecipeEntry};
use serde::{Deserialize, Serialize};

use crate::process::peak_rss_bytes;
use crate::row::{self, Made, Revision};

const LOOKUPS_WARM: u64 = 200_000;
const LOOKUPS_COLD: u64 = 2_000;
/// Pieces of one image, at most: 64 GiB of data.
const IMAGE_ENTRIES: u64 = 1 << 20;

/// Which sizes to measure.
#[derive(Debug, Args)]
pub struct SizesPlan {
    /// How many pieces the index holds.
    #[arg(long, value_delimiter = ',', default_value = "100000,1000000,10000000,100000000")]
    entries: Vec<u64>,
    /// Where the index may lie: 35 bytes a piece.
    #[arg(long)]
    work: PathBuf,
    /// Where rows go.
    #[arg(long)]
    results: PathBuf,
}

/// An index of one size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// Pieces in it.
    pub entries: u64,
    /// Images that they are of, indexed one after the other.
    pub images: u64,
    /// Sorted runs that a look-up may have to look at.
    pub runs: u64,
    /// Seconds to build it.
    pub build_s: f64,
    /// Its files.
    pub file_bytes: u64,
    /// Bytes that an open index holds in memory.
    pub memory_bytes: u64,
    /// Peak memory of the process, with building, in bytes.
    pub peak_rss_bytes: u64,
    /// Microseconds for a piece that is there, its page in the page cache.
    pub hit_us: f64,
    /// The same for one that is not there.
    pub miss_us: f64,
    /// With the index's files out of the page cache.
    pub cold_hit_us: f64,
    /// The same for one that is not there.
    pub cold_miss_us: f64,
}

/// Measures each size and appends a row for each.
///
/// # Errors
///
/// When the index cannot be built or a row not be written.
pub fn run(plan: &SizesPlan) -> Result<()> {
    let revision = Revision::current()?;
    for entries in &plan.entries {
        let folder = tempfile::tempdir_in(&plan.work)?;
        let row = measure(folder.path(), *entries, &revision)?;
        eprintln!(
            "{} pieces of {} images: built in {:.1} s, {:.1} MiB, {:.3} bytes of memory a piece; a look-up {:.1} us, \
             {:.1} us of what is not there; cold {:.0} and {:.0} us; peak {} MiB",
            row.entries,
            row.images,
            row.build_s,
            row.file_bytes as f64 / f64::from(1 << 20),
            row.memory_bytes as f64 / row.entries as f64,
            row.hit_us,
            row.miss_us,
            row.cold_hit_us,
            row.cold_miss_us,
            row.peak_rss_bytes >> 20
        );
        row::append(&plan.results, &row)?;
    }
    Ok(())
}

/// The piece of number `n`: its id is as spread as a hash, at a fraction of the cost.
fn piece(n: u64) -> RecipeEntry {
    // The finalizer of SplitMix64 (Steele, Lea, Flood, 2014), which maps no two numbers to one.
    let mut key = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^= key >> 31;
    let mut id = [0; ChunkId::BYTES];
    id[..8].copy_from_slice(&key.to_le_bytes());
    RecipeEntry { offset: n << 16, len: 1 << 16, id: ChunkId::from_bytes(id) }
}

fn measure(folder: &Path, entries: u64, revision: &Revision) -> Result<Row> {
    let places = Places::open(folder)?;
    let began = Instant::now();
    let images = entries.div_ceil(IMAGE_ENTRIES);
    let each = entries.div_ceil(images);
    for image in 0..images {
        let mut builder = places.builder();
        let first = image * each;
        for n in 0..each.min(entries - first) {
            let of_image = piece(first + n);
            builder.add_piece(&RecipeEntry { offset: n << 16, ..of_image })?;
        }
        let identity = ImageIdentity { size: 0, mtime_ns: 0, inode: 0 };
        let path = format!("/images/{image}").into();
        places.finish(builder, Wanted { path, bytes: each << 16, identity, record: None })?;
    }
    let build_s = began.elapsed().as_secs_f64();
    let snapshot = places.snapshot();
    let summary = snapshot.summary();
    ensure!(summary.entries == entries, "{} of {entries} pieces are there", summary.entries);
    // Once to have it in the page cache.
    lookups(&snapshot, entries, LOOKUPS_WARM, 0)?;
    let hit_us = lookups(&snapshot, entries, LOOKUPS_WARM, 0)?;
    let miss_us = lookups(&snapshot, entries, LOOKUPS_WARM, entries)?;
    out_of_cache(folder)?;
    let cold_hit_us = lookups(&snapshot, entries, LOOKUPS_COLD, 0)?;
    out_of_cache(folder)?;
    let cold_miss_us = lookups(&snapshot, entries, LOOKUPS_COLD, entries)?;
    Ok(Row {
        made: Made::now(revision)?,
        entries,
        images,
        runs: summary.runs,
        build_s,
        file_bytes: summary.file_bytes,
        memory_bytes: summary.memory_bytes,
        peak_rss_bytes: peak_rss_bytes(std::process::id()),
        hit_us,
        miss_us,
        cold_hit_us,
        cold_miss_us,
    })
}

fn out_of_cache(folder: &Path) -> Result<()> {
    for file in fs::read_dir(folder)? {
        let mut input = std::ffi::OsString::from("if=");
        input.push(file?.path());
        let status = Command::new("dd")
            .arg(input)
            .args(["iflag=nocache", "count=0", "status=none"])
            .status()?;
        ensure!(status.success(), "dd fails");
    }
    Ok(())
}

/// Microseconds for a look-up of pieces all over the index, or, with a shift, of none.
fn lookups(snapshot: &Snapshot, entries: u64, count: u64, shift: u64) -> Result<f64> {
    let began = Instant::now();
    for lookup in 0..count {
        let n = lookup.wrapping_mul(0x9e37_79b1) % entries + shift;
        let found = snapshot.lookup(piece_key(&piece(n).id));
        ensure!(found.is_empty() == (shift > 0), "piece {n} is found or not against what is in it");
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / count as f64)
}
