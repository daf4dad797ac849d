//! How fast the data path is on this machine, one thread, best of several passes.
//!
//! `cargo run --release -p longhaul-dedup --example speed -- FILE` measures on up to 32 MiB of a
//! file (a disk image, a memory dump), zero pages left out; without a file, on this program itself.
//! The ladder of compression levels and the limits of the page hasher were set by these numbers.

use std::{env, fs::File, hint::black_box, io::Read, time::Instant};

use bytes::Bytes;
use longhaul_dedup::{
    blocks::{hash_blocks, scan},
    compress::{Compressor, Level, decompress},
    delta::{self, SubHashes},
    lzma::Effort,
    pagebatch::{ContentHasher, Limits, PageAt, PageRecord, decode, encode},
    pages::{PAGE_BYTES, Page, PageHash, hash_pages},
    zeros::is_zero,
};

const MAX_BYTES: u64 = 32 << 20;
const PASSES: usize = 5;

fn main() -> std::io::Result<()> {
    let path = env::args_os().nth(1).map_or_else(env::current_exe, |path| Ok(path.into()))?;
    let mut data = Vec::new();
    File::open(&path)?.take(MAX_BYTES).read_to_end(&mut data)?;
    let data = data.chunks_exact(PAGE_BYTES).filter(|page| !is_zero(page)).collect::<Vec<_>>();
    let data = data.concat();
    println!("{}: {} pages with content", path.display(), data.len() / PAGE_BYTES);
    disk(&data);
    memory(&data);
    compression("file", &data);
    let mut noise = vec![0; 16 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    compression("noise", &noise);
    Ok(())
}

fn disk(data: &[u8]) {
    let shared = Bytes::copy_from_slice(data);
    report("hash blocks", data.len(), || hash_blocks(data).len());
    report("cut into pieces", data.len(), || scan(&[(0, shared.clone())]).pieces.len());
    let zeros = vec![0; data.len().min(1 << 20)];
    report("is_zero on zeros", zeros.len(), || is_zero(black_box(&zeros)));
}

fn memory(data: &[u8]) {
    let pages: Vec<&[u8; PAGE_BYTES]> = data.as_chunks().0.iter().collect();
    report("hash pages one by one", data.len(), || {
        pages.iter().map(|page| PageHash::of(page)).collect::<Vec<_>>()
    });
    for at_once in [2, 3, 4, 5, 6, 8, 12, 16, 4096] {
        report(&format!("hash pages, {at_once} at once"), data.len(), || {
            pages.chunks(at_once).map(|group| hash_pages(group).len()).sum::<usize>()
        });
    }
    report("sub-block hashes", data.len(), || {
        pages.iter().map(|page| SubHashes::of(page)).collect::<Vec<_>>()
    });
    for changed_blocks in [0, 2, 16] {
        let bases: Vec<SubHashes> = pages
            .iter()
            .map(|page| {
                let mut old = **page;
                for block in 0..changed_blocks {
                    old[block * 256] ^= 1;
                }
                SubHashes::of(&old)
            })
            .collect();
        report(&format!("delta, {changed_blocks} sub-blocks changed"), data.len(), || {
            let deltas = pages.iter().zip(&bases).map(|(page, base)| delta::encode(page, base));
            deltas.map(|delta| delta.encoded_bytes()).sum::<usize>()
        });
    }
    page_batches(&pages);
}

fn page_batches(pages: &[&[u8; PAGE_BYTES]]) {
    let batches: Vec<Vec<PageRecord>> = pages
        .chunks(256)
        .map(|batch| {
            let full = |(number, page): (usize, &&[u8; PAGE_BYTES])| PageRecord::Full {
                at: PageAt { region: 0, page: number as u64 },
                content: Page::from(*page),
            };
            batch.iter().enumerate().map(full).collect()
        })
        .collect();
    let bytes = pages.len() * PAGE_BYTES;
    let limits = Limits { records: 256, region_pages: &[256] };
    for level in [Level::Store, Level::Zstd(1), Level::Zstd(3)] {
        let mut compressor = Compressor::new();
        let mut coded = Vec::new();
        report(&format!("page batches, hash and encode, {level:?}"), bytes, || {
            let batch_pages = pages.chunks(256);
            coded = batches
                .iter()
                .zip(batch_pages)
                .map(|(records, pages)| {
                    let mut hasher = ContentHasher::new();
                    for (record, hash) in records.iter().zip(hash_pages(pages)) {
                        hasher.page(record.at(), &hash);
                    }
                    encode(records, hasher.finish(), &mut compressor, level)
                })
                .collect();
        });
        report(&format!("page batches, decode and prove, {level:?}"), bytes, || {
            let rebuilt = coded.iter().map(|batch| {
                let batch = decode(batch, &limits).expect("it was encoded just now");
                batch.rebuild(|_| None, |_| None).expect("its pages are full").len()
            });
            rebuilt.sum::<usize>()
        });
    }
}

fn compression(what: &str, data: &[u8]) {
    for batch_bytes in [64 << 10, 1 << 20, 8 << 20] {
        let batches: Vec<Bytes> = data.chunks(batch_bytes).map(Bytes::copy_from_slice).collect();
        let bytes = data.len();
        let zstd = [-5, -1, 1, 3, 6, 9, 12, 16, 19].map(Level::Zstd);
        let lzma = [Effort::Quick, Effort::Careful, Effort::Thorough].map(Level::Lzma);
        for level in zstd.into_iter().chain(lzma) {
            let mut compressor = Compressor::new();
            let mut packed = Vec::new();
            let seconds = best_of(if level < Level::Zstd(6) { PASSES } else { 1 }, || {
                packed = batches
                    .iter()
                    .map(|batch| compressor.compress(level, batch.clone()))
                    .collect::<Vec<_>>();
            });
            let out: usize = packed.iter().map(|packed| packed.packed_len()).sum();
            let unpack_seconds = best_of(PASSES, || {
                for packed in &packed {
                    black_box(decompress(packed, batch_bytes).expect("it was packed just now"));
                }
            });
            println!(
                "{what}, {:>5} KiB batches, {level:?}: {:.3} GB/s, ratio {:.2}, unpack {:.2} GB/s",
                batch_bytes >> 10,
                bytes as f64 / seconds / 1e9,
                bytes as f64 / out as f64,
                bytes as f64 / unpack_seconds / 1e9,
            );
        }
    }
}

fn report<T>(what: &str, bytes: usize, mut work: impl FnMut() -> T) {
    let seconds = best_of(PASSES, || black_box(work()));
    println!("{what}: {:.2} GB/s", bytes as f64 / seconds / 1e9);
}

fn best_of<T>(passes: usize, mut work: impl FnMut() -> T) -> f64 {
    (0..passes)
        .map(|_| {
            let begin = Instant::now();
            black_box(work());
            begin.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
