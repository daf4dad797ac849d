//! What a look-up in the index of images costs, by its size; how fast it is built, and in how much memory.
//!
//! `cargo run --release -p longhaul-dedup --example places -- DIR [ENTRIES..]` builds indexes of 10^5, 10^6 and
//! 10^7 entries (or of those sizes) below DIR, one after the other, and removes them. "Cold" is with the
//! index's files out of the page cache; "several images" is built image by image, 1 M entries each at most.

use std::{env, error::Error, fs, path::Path, process::Command, time::Instant};

use longhaul_dedup::{
    id::ChunkId,
    places::{Places, Snapshot, Wanted, piece_key},
    recipe::{ImageIdentity, RecipeEntry},
};

const LOOKUPS_WARM: u64 = 200_000;
const LOOKUPS_COLD: u64 = 2_000;
const IMAGE_ENTRIES: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let dir = args.next().ok_or("a folder on the disk that is to be measured")?;
    let mut sizes = args.map(|size| size.parse()).collect::<Result<Vec<u64>, _>>()?;
    if sizes.is_empty() {
        sizes = vec![100_000, 1_000_000, 10_000_000];
    }
    println!(
        "{:>11} {:>6} {:>4} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}",
        "entries",
        "images",
        "runs",
        "build s",
        "file MiB",
        "mem B/ent",
        "hit us",
        "miss us",
        "cold hit",
        "cold miss",
        "peak MiB"
    );
    for entries in sizes {
        for images in [1, entries.div_ceil(IMAGE_ENTRIES)] {
            let dir = Path::new(&dir).join("places-example");
            measure(&dir, entries, images)?;
            fs::remove_dir_all(&dir)?;
            if entries <= IMAGE_ENTRIES {
                break;
            }
        }
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

fn measure(dir: &Path, entries: u64, images: u64) -> Result<(), Box<dyn Error>> {
    let places = Places::open(dir)?;
    let begin = Instant::now();
    let each = entries.div_ceil(images);
    for image in 0..images {
        let mut builder = places.builder();
        for n in image * each..entries.min((image + 1) * each) {
            builder.add_piece(&piece(n))?;
        }
        let identity = ImageIdentity { size: 0, mtime_ns: 0, inode: 0 };
        let path = format!("/images/{image}").into();
        places.finish(builder, Wanted { path, bytes: each << 16, identity, record: None })?;
    }
    let build = begin.elapsed().as_secs_f64();
    let snapshot = places.snapshot();
    let summary = snapshot.summary();
    assert_eq!(summary.entries, entries, "all that was added is there");
    let warm = |shift| lookups(&snapshot, entries, LOOKUPS_WARM, shift);
    // Once to have it in the page cache.
    warm(0);
    let (hit, miss) = (warm(0), warm(entries));
    let cold = |shift| -> Result<f64, Box<dyn Error>> {
        for file in fs::read_dir(dir)? {
            let mut input = "if=".to_owned();
            input.push_str(&file?.path().to_string_lossy());
            let args = [&input, "iflag=nocache", "count=0", "status=none"];
            Command::new("dd").args(args).status()?;
        }
        Ok(lookups(&snapshot, entries, LOOKUPS_COLD, shift))
    };
    let (cold_hit, cold_miss) = (cold(0)?, cold(entries)?);
    println!(
        "{entries:>11} {images:>6} {:>4} {build:>9.2} {:>9.1} {:>10.3} {hit:>10.2} {miss:>10.2} {cold_hit:>10.1} {cold_miss:>10.1} {:>9}",
        summary.runs,
        summary.file_bytes as f64 / f64::from(1 << 20),
        summary.memory_bytes as f64 / entries as f64,
        peak_mib()?
    );
    Ok(())
}

/// Microseconds for a look-up of pieces all over the index, or, with a shift, of none.
fn lookups(snapshot: &Snapshot, entries: u64, count: u64, shift: u64) -> f64 {
    let begin = Instant::now();
    for lookup in 0..count {
        let n = lookup.wrapping_mul(0x9e37_79b1) % entries + shift;
        let found = snapshot.lookup(piece_key(&piece(n).id));
        assert_eq!(found.is_empty(), shift > 0);
    }
    begin.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn peak_mib() -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).ok_or("no VmHWM")?;
    Ok(kib.trim().parse::<u64>()? >> 10)
}
