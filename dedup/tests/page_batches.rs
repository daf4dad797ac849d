//! Page batches between a source and a target that remember what was sent.

use std::collections::HashMap;

use bytes::Bytes;
use longhaul_dedup::{
    DecodeError,
    compress::{Compressor, Level},
    delta::{self, Delta, SubHashes},
    pagebatch::{
        BlockAt, ContentHash, ContentHasher, Limits, MAX_PAGES_PER_BATCH, PageAt, PageBatchError,
        PageRecord, Placed, RebuildError, decode, encode,
    },
    pages::{PAGE_BYTES, Page, PageHash},
};
use proptest::prelude::*;

const REGION_PAGES: [u64; 3] = [64, 0, 16];
const LIMITS: Limits<'_> = Limits { records: MAX_PAGES_PER_BATCH, region_pages: &REGION_PAGES };

fn at(region: u16, page: u64) -> PageAt {
    PageAt { region, page }
}

fn page(byte: u8) -> Page {
    Page::from(&[byte; PAGE_BYTES])
}

fn hash(content: &Page) -> PageHash {
    PageHash::of(content.as_array())
}

fn packed(records: &[PageRecord], content_hash: ContentHash, level: Level) -> Bytes {
    encode(records, content_hash, &mut Compressor::new(), level)
}

/// A disk of which each block is full of its own number.
fn disk(place: BlockAt) -> Option<Page> {
    (place.disk == 1).then(|| page(place.block as u8))
}

fn no_hash() -> ContentHash {
    ContentHasher::new().finish()
}

#[test]
fn the_bytes_of_a_batch_are_fixed() {
    let changed = Delta::new(0b10, Bytes::from(vec![5; 256])).unwrap();
    let records = [
        PageRecord::Zero { at: at(0, 3), count: 5 },
        PageRecord::Full { at: at(0, 8), content: page(7) },
        PageRecord::Same { at: at(2, 1), like: at(0, 8) },
        PageRecord::Delta { at: at(2, 0), delta: changed },
        PageRecord::Block { at: at(2, 1), block: BlockAt { disk: 1, block: 9 } },
        PageRecord::Block { at: at(2, 2), block: BlockAt { disk: 1, block: 10 } },
    ];
    let mut hasher = ContentHasher::new();
    hasher.zero(at(0, 3), 5);
    hasher.page(at(0, 8), &hash(&page(7)));
    let content_hash = hasher.finish();
    let mut hashed = vec![0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0];
    hashed.extend_from_slice(&[1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    hashed.extend_from_slice(hash(&page(7)).as_bytes());
    assert_eq!(content_hash.as_bytes(), blake3::hash(&hashed).as_bytes());

    let bytes = packed(&records, content_hash, Level::Store);
    let mut expected = vec![2];
    expected.extend_from_slice(content_hash.as_bytes());
    // Stored, 4380 bytes; 6 records; kinds; regions 0 0 +2 0 0 0; pages +3, 0, 1 - 9, 0 - 2, 0, 0; a run
    // of 5; like 2 - 2, 1 + 7; blocks 9 of disk 1 and the next; a bitmap.
    expected.extend_from_slice(&[0, 0x9c, 0x22]);
    expected
        .extend_from_slice(&[6, 0, 1, 2, 3, 4, 4, 0, 0, 4, 0, 0, 0, 6, 0, 15, 3, 0, 0, 5, 3, 14]);
    expected.extend_from_slice(&[2, 18, 0, 0, 2, 0]);
    expected.extend_from_slice(&[7; PAGE_BYTES]);
    expected.extend_from_slice(&[5; 256]);
    assert_eq!(bytes[..64], expected[..64]);
    assert!(bytes == expected, "contents");
}

#[test]
fn references_are_to_the_last_record_before_them() {
    let one = |byte: u8, place: u64| PageRecord::Full { at: at(0, place), content: page(byte) };
    let same = |place: u64, like: u64| PageRecord::Same { at: at(0, place), like: at(0, like) };
    let records = [
        same(10, 1),
        one(2, 1),
        same(11, 1),
        PageRecord::Zero { at: at(0, 0), count: 4 },
        same(12, 1),
        one(3, 1),
        same(13, 1),
        PageRecord::Delta {
            at: at(0, 1),
            delta: Delta::new(1, Bytes::from(vec![9; 256])).unwrap(),
        },
        same(14, 1),
    ];
    let mut changed = [3; PAGE_BYTES];
    changed[..256].fill(9);
    let changed = Page::from(&changed);
    let zero = Page::zero();
    let contents =
        [&page(1), &page(2), &page(2), &zero, &zero, &page(3), &page(3), &changed, &changed];
    let mut hasher = ContentHasher::new();
    for (record, content) in records.iter().zip(contents) {
        match record {
            PageRecord::Zero { at, count } => hasher.zero(*at, *count),
            _ => hasher.page(record.at(), &hash(content)),
        }
    }
    let bytes = packed(&records, hasher.finish(), Level::Zstd(1));
    let batch = decode(&bytes, &LIMITS).unwrap();
    assert_eq!(batch.records(), records);
    let placed = batch.rebuild(|place| (place == at(0, 1)).then(|| page(1)), disk).unwrap();
    for (placed, content) in placed.iter().zip(contents) {
        if let Placed::Page { content: rebuilt, hash: rebuilt_hash, .. } = placed {
            assert_eq!(rebuilt, content);
            assert_eq!(*rebuilt_hash, hash(content));
        }
    }
}

#[test]
fn a_reference_that_went_astray_is_found() {
    let records = [PageRecord::Same { at: at(0, 5), like: at(2, 3) }];
    let mut hasher = ContentHasher::new();
    hasher.page(at(0, 5), &hash(&page(1)));
    let batch = decode(&packed(&records, hasher.finish(), Level::Store), &LIMITS).unwrap();
    assert!(batch.clone().rebuild(|_| Some(page(1)), disk).is_ok());
    assert_eq!(batch.clone().rebuild(|_| Some(page(2)), disk), Err(RebuildError::Mismatch));
    assert_eq!(
        batch.rebuild(|_| None, disk),
        Err(RebuildError::Missing { at: at(0, 5), like: at(2, 3) })
    );
}

#[test]
fn blocks_of_a_disk_are_asked_for_in_order_and_proven() {
    let block = |disk, block| BlockAt { disk, block };
    let record = |place, block| PageRecord::Block { at: at(0, place), block };
    let same = PageRecord::Same { at: at(0, 7), like: at(0, 5) };
    let records = [record(5, block(1, 3)), record(6, block(1, 200)), same];
    let mut hasher = ContentHasher::new();
    for (place, byte) in [(5, 3), (6, 200), (7, 3)] {
        hasher.page(at(0, place), &hash(&page(byte)));
    }
    let batch = decode(&packed(&records, hasher.finish(), Level::Store), &LIMITS).unwrap();
    assert_eq!(batch.records(), records);
    assert_eq!(batch.clone().rebuild(|_| None, disk).unwrap().len(), 3);
    let other = |place: BlockAt| Some(page(place.block as u8 + u8::from(place.block == 200)));
    assert_eq!(batch.clone().rebuild(|_| None, other), Err(RebuildError::Mismatch));
    let missing = RebuildError::MissingBlock { at: at(0, 5), block: block(1, 3) };
    assert_eq!(batch.clone().rebuild(|_| None, |_| None), Err(missing));
    // Those that were asked for again, whatever the disk holds now.
    let mut again = [page(3), page(200)].into_iter();
    assert!(batch.rebuild(|_| None, |_| again.next()).is_ok());
}

#[test]
fn right_content_at_the_wrong_place_is_found() {
    let mut hasher = ContentHasher::new();
    hasher.page(at(0, 5), &hash(&page(1)));
    let elsewhere = [PageRecord::Full { at: at(0, 6), content: page(1) }];
    let batch = decode(&packed(&elsewhere, hasher.finish(), Level::Store), &LIMITS).unwrap();
    assert_eq!(batch.rebuild(|_| None, disk), Err(RebuildError::Mismatch));
}

#[test]
fn pages_that_the_guest_does_not_have_are_refused() {
    let full = |place: PageAt| PageRecord::Full { at: place, content: page(1) };
    for bad in [
        full(at(0, 64)),
        full(at(1, 0)),
        full(at(3, 0)),
        full(at(0, u64::MAX)),
        PageRecord::Zero { at: at(2, 10), count: 7 },
        PageRecord::Zero { at: at(2, u64::MAX), count: u32::MAX },
        PageRecord::Same { at: at(0, 0), like: at(2, 16) },
    ] {
        let bytes = packed(&[full(at(0, 63)), bad.clone()], no_hash(), Level::Zstd(1));
        let error = decode(&bytes, &LIMITS).unwrap_err();
        assert!(matches!(error, PageBatchError::OutsideMemory { .. }), "{bad:?}: {error}");
    }
}

#[test]
fn more_records_than_allowed_are_refused() {
    let record = PageRecord::Full { at: at(0, 1), content: page(1) };
    let bytes = packed(&vec![record; 9], no_hash(), Level::Zstd(1));
    assert!(decode(&bytes, &Limits { records: 9, ..LIMITS }).is_ok());
    let error = decode(&bytes, &Limits { records: 8, ..LIMITS }).unwrap_err();
    assert!(matches!(
        error,
        PageBatchError::Unpack(_) | PageBatchError::Malformed(DecodeError::TooLarge { .. })
    ));
}

#[test]
fn a_full_batch_fits() {
    let mut noise = vec![0; PAGE_BYTES * MAX_PAGES_PER_BATCH];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let noise = Bytes::from(noise);
    let records: Vec<PageRecord> = (0..MAX_PAGES_PER_BATCH)
        .map(|number| {
            let content = noise.slice(number * PAGE_BYTES..(number + 1) * PAGE_BYTES);
            // Far apart, so that the headers are as wide as they get.
            let place = if number % 2 == 0 { at(0, 0) } else { at(u16::MAX, u64::MAX - 1) };
            PageRecord::Full { at: place, content: content.try_into().unwrap() }
        })
        .collect();
    let mut region_pages = vec![0; 1 << 16];
    region_pages[0] = 1;
    region_pages[usize::from(u16::MAX)] = u64::MAX;
    let limits = Limits { records: MAX_PAGES_PER_BATCH, region_pages: &region_pages };
    let bytes = packed(&records, no_hash(), Level::Zstd(3));
    assert_eq!(decode(&bytes, &limits).unwrap().records(), records);
}

/// One page of the guest gets new content, and the source chooses how to say so.
#[derive(Debug, Clone)]
enum Write {
    Zero { region: usize, first: u64, count: u32 },
    Full { place: PageAt, byte: u8 },
    Same { place: PageAt, like: PageAt },
    Change { place: PageAt, offset: usize, byte: u8 },
    Block { place: PageAt, number: u64 },
}

fn place() -> impl Strategy<Value = PageAt> {
    prop_oneof![(0_u64..64).prop_map(|page| at(0, page)), (0_u64..16).prop_map(|page| at(2, page))]
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        (0_u64..16, 1_u32..16, any::<bool>()).prop_map(|(first, count, last)| Write::Zero {
            region: if last { 2 } else { 0 },
            first,
            count: count.min(16 - first as u32),
        }),
        (place(), 0_u8..5).prop_map(|(place, byte)| Write::Full { place, byte }),
        (place(), place()).prop_map(|(place, like)| Write::Same { place, like }),
        (place(), 0..PAGE_BYTES, any::<u8>()).prop_map(|(place, offset, byte)| Write::Change {
            place,
            offset,
            byte
        }),
        (place(), any::<u64>()).prop_map(|(place, number)| Write::Block { place, number }),
    ]
}

/// Memory as one side knows it: pages that were never sent are not there.
type Memory = HashMap<PageAt, Page>;

/// Applies writes at the source and says how the batch reads.
fn code(memory: &mut Memory, writes: &[Write]) -> (Vec<PageRecord>, ContentHash) {
    let mut records = Vec::new();
    let mut hasher = ContentHasher::new();
    for write in writes {
        let (place, record, content) = match write {
            Write::Zero { region, first, count } => {
                let first = at(*region as u16, *first);
                for page in first.page..first.page + u64::from(*count) {
                    memory.insert(at(first.region, page), Page::zero());
                }
                hasher.zero(first, *count);
                records.push(PageRecord::Zero { at: first, count: *count });
                continue;
            }
            Write::Full { place, byte } => {
                let content = page(*byte);
                (place, PageRecord::Full { at: *place, content: content.clone() }, content)
            }
            Write::Same { place, like } => {
                let Some(content) = memory.get(like) else { continue };
                (place, PageRecord::Same { at: *place, like: *like }, content.clone())
            }
            Write::Block { place, number } => {
                let block = BlockAt { disk: 1, block: *number };
                let content = page(*number as u8);
                (place, PageRecord::Block { at: *place, block }, content)
            }
            Write::Change { place, offset, byte } => {
                let Some(old) = memory.get(place) else { continue };
                let mut new = *old.as_array();
                new[*offset] = *byte;
                let delta = delta::encode(&new, &SubHashes::of(old.as_array()));
                (place, PageRecord::Delta { at: *place, delta }, Page::from(&new))
            }
        };
        hasher.page(*place, &hash(&content));
        memory.insert(*place, content);
        records.push(record);
    }
    (records, hasher.finish())
}

fn write_all(memory: &mut Memory, placed: Vec<Placed>) {
    for placed in placed {
        match placed {
            Placed::Zero { at: first, count } => {
                for page in first.page..first.page + u64::from(count) {
                    memory.insert(at(first.region, page), Page::zero());
                }
            }
            Placed::Page { at, content, .. } => {
                memory.insert(at, content);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_target_ends_with_the_memory_of_the_source(
        batches in prop::collection::vec(prop::collection::vec(write(), 0..40), 1..5),
        level in prop_oneof![Just(Level::Store), Just(Level::Zstd(1)), Just(Level::Zstd(-5))],
    ) {
        let (mut source, mut target) = (Memory::new(), Memory::new());
        for writes in &batches {
            let (records, content_hash) = code(&mut source, writes);
            let batch = decode(&packed(&records, content_hash, level), &LIMITS).unwrap();
            prop_assert_eq!(batch.records(), &records[..]);
            let placed = batch.rebuild(|place| target.get(&place).cloned(), disk).unwrap();
            write_all(&mut target, placed);
            prop_assert_eq!(&target, &source);
        }
    }

    /// Whatever was changed under way, pages that pass are those of the source.
    #[test]
    fn a_changed_batch_is_refused_or_means_the_same(
        writes in prop::collection::vec(write(), 1..30),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        near_front: bool,
        level in prop_oneof![Just(Level::Store), Just(Level::Zstd(1))],
    ) {
        let before: Memory = (0..64).map(|number| (at(0, number), page(number as u8))).collect();
        let mut source = before.clone();
        let (records, content_hash) = code(&mut source, &writes);
        let mut bytes = packed(&records, content_hash, level).to_vec();
        for (place, byte) in &mutations {
            let reach = if near_front { bytes.len().min(200) } else { bytes.len() };
            bytes[place.index(reach)] = *byte;
        }
        if let Ok(batch) = decode(&bytes.into(), &LIMITS)
            && let Ok(placed) = batch.rebuild(|place| before.get(&place).cloned(), disk)
        {
            let mut target = before;
            write_all(&mut target, placed);
            prop_assert_eq!(target, source);
        }
    }

    #[test]
    fn garbage_is_no_batch(garbage in prop::collection::vec(any::<u8>(), 0..600)) {
        // As a whole message, and as the records of one that is stored.
        prop_assert!(decode(&Bytes::from(garbage.clone()), &LIMITS).is_err());
        let mut message = vec![2];
        message.extend_from_slice(&[0; 32]);
        Compressor::new().compress(Level::Store, garbage.into()).encode_into(&mut message);
        let _ = decode(&message.into(), &LIMITS);
    }

    #[test]
    fn a_cut_batch_is_refused(
        writes in prop::collection::vec(write(), 1..10),
        cut in any::<prop::sample::Index>(),
    ) {
        let (records, content_hash) = code(&mut Memory::new(), &writes);
        let bytes = packed(&records, content_hash, Level::Zstd(1));
        prop_assert!(decode(&bytes.slice(..cut.index(bytes.len())), &LIMITS).is_err());
    }
}
