//! The recipe's file under crashes, damage and ordinary use.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use longhaul_dedup::{
    blocks::ShortId,
    id::ChunkId,
    recipe::{HeaderError, ImageIdentity, Recipe, RecipeEntry, RecipeError, RecipeLog, Sample},
};
use proptest::prelude::*;
use tempfile::TempDir;

const IMAGE_BYTES: u64 = 1 << 20;
/// In a model of an image: a byte that is known to be zero.
const ZERO: usize = usize::MAX;

fn entry(offset: u64, len: u32) -> RecipeEntry {
    let id = ChunkId::of(&[&offset.to_le_bytes()[..], &len.to_le_bytes()].concat());
    RecipeEntry { offset, len, id }
}

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = RecipeLog::path_for(&dir.path().join("disk.qcow2"));
    (dir, path)
}

fn entries(recipe: &Recipe) -> Vec<RecipeEntry> {
    recipe.entries().collect()
}

fn identity() -> ImageIdentity {
    ImageIdentity { size: 777, mtime_ns: -5, inode: 42 }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_name_is_the_images_with_a_suffix() {
    let path = RecipeLog::path_for("/images/a.qcow2".as_ref());
    assert_eq!(path, PathBuf::from("/images/a.qcow2.longhaul-recipe"));
}

/// Version 2, byte for byte. If this fails, released files can no longer be read: restore the
/// layout or make a version 3.
#[test]
fn the_bytes_of_version_2_are_fixed() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    log.append(&[RecipeEntry { offset: 4096, len: 512, id: ChunkId::of(b"one") }]).unwrap();
    log.append_samples(&[Sample { offset: 4096, id: ShortId::from_bytes(*b"16blocks") }]).unwrap();
    log.append_zeros(Some(8192..16384)).unwrap();
    log.void(Some(4096..12288)).unwrap();
    log.mark_complete(3, identity()).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(hex(&bytes), GOLDEN);

    let golden: Vec<u8> = (0..GOLDEN.len() / 2)
        .map(|at| u8::from_str_radix(&GOLDEN[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    let recipe = Recipe::read(&golden[..]).unwrap();
    assert_eq!(recipe.image_bytes(), IMAGE_BYTES);
    assert!(recipe.is_empty());
    assert_eq!(recipe.samples().count(), 0);
    assert!(recipe.zeros().eq(Some(12288..16384)));
    let completed = recipe.complete().unwrap();
    assert_eq!((completed.generation, completed.image), (3, identity()));
}

/// Header and its hash; piece record: head, offset and length, id, check; sample record: head, offset
/// and short id, check; zeros and void records: head, range, check; complete record: head, generation
/// and identity, check.
const GOLDEN: &str = concat!(
    "4c48524543495045020000000000000000001000000000000000000000000000",
    "ef5227b819477dcc67d0659a4953431fca5a47cb1d4d778e7475a923f3d4e532",
    "0100000001000000",
    "001000000000000000020000",
    "d33fb48ab5adff269ae172b29a6913ff04f6f266207a7a8e976f2ecd571d4492",
    "431cfc59f6b2cf05f9fc7f9e2c1749ed",
    "0500000001000000",
    "00100000000000003136626c6f636b73",
    "1fc73e4bcd0bdbc6c44e3c18c8ad5165",
    "0400000001000000",
    "00200000000000000020000000000000",
    "b21ef622cff0032d7f41bc99c9c1a2b6",
    "0200000001000000",
    "00100000000000000020000000000000",
    "aa5f4f05741f8bc20b52e187065aa6dd",
    "0300000001000000",
    "03000000000000000903000000000000fbffffffffffffff2a00000000000000",
    "a7bd740de5e865f0d252c0bc30b0cea9",
);

#[test]
fn what_was_appended_is_there_after_a_restart() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    let many: Vec<RecipeEntry> = (0..10_000).map(|n| entry(n * 100, 100)).collect();
    log.append(&many).unwrap();
    log.sync().unwrap();
    let reopened = RecipeLog::open(&path).unwrap();
    assert_eq!(entries(reopened.recipe()), many);
    assert_eq!(reopened.cut_bytes(), 0);
    assert_eq!(&RecipeLog::load(&path).unwrap(), log.recipe());
}

#[test]
fn a_later_write_supersedes_every_chunk_that_it_touches() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    log.append(&[entry(0, 100), entry(100, 100), entry(200, 100), entry(300, 100)]).unwrap();
    log.append(&[entry(150, 60)]).unwrap();
    log.void(Some(399..400)).unwrap();
    for recipe in [log.recipe().clone(), RecipeLog::load(&path).unwrap()] {
        assert_eq!(entries(&recipe), [entry(0, 100), entry(150, 60)]);
    }
}

#[test]
fn any_append_ends_completeness() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    for last in 0..3 {
        log.append(&[entry(0, 4096)]).unwrap();
        log.mark_complete(9, identity()).unwrap();
        assert_eq!(RecipeLog::load(&path).unwrap().complete(), log.complete());
        assert_eq!(log.complete().unwrap().generation, 9);
        match last {
            0 => log.append(&[entry(0, 4096)]).unwrap(),
            1 => log.void(Some(0..1)).unwrap(),
            _ => continue,
        }
        assert_eq!(log.complete(), None);
        assert_eq!(RecipeLog::open(&path).unwrap().complete(), None);
    }
    log.compact().unwrap();
    assert_eq!(RecipeLog::open(&path).unwrap().complete().unwrap().image, identity());
}

#[test]
fn an_image_is_recognised_until_it_is_written_to() {
    let (dir, _) = place();
    let path = dir.path().join("disk.raw");
    let mut image = File::create(&path).unwrap();
    image.write_all(b"boot").unwrap();
    let before = ImageIdentity::of(&image.metadata().unwrap());
    assert_eq!(before, ImageIdentity::of(&fs::metadata(&path).unwrap()));
    assert_eq!((before.size, before.inode), (4, image.metadata().unwrap().ino()));
    image.write_all(b"more").unwrap();
    assert_ne!(before, ImageIdentity::of(&image.metadata().unwrap()));
}

#[test]
fn a_file_cut_at_any_byte_keeps_the_records_before_the_cut() {
    let (dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    let mut states = vec![(fs::metadata(&path).unwrap().len(), log.recipe().clone())];
    let mut note = |log: &RecipeLog| {
        states.push((fs::metadata(log.path()).unwrap().len(), log.recipe().clone()));
    };
    log.append(&[entry(0, 512), entry(512, 512)]).unwrap();
    note(&log);
    log.void(Some(0..10)).unwrap();
    note(&log);
    log.append(&[entry(4096, 512)]).unwrap();
    note(&log);
    log.mark_complete(1, identity()).unwrap();
    note(&log);
    let bytes = fs::read(&path).unwrap();
    let cut_path = dir.path().join("cut");
    for cut in 0..bytes.len() {
        fs::write(&cut_path, &bytes[..cut]).unwrap();
        let opened = RecipeLog::open(&cut_path);
        let Some((end, expected)) = states.iter().rev().find(|(end, _)| *end <= cut as u64) else {
            let error = opened.unwrap_err();
            assert!(
                matches!(&error, RecipeError::Unreadable { reason: HeaderError::NotARecipe, .. }),
                "{cut}: {error}"
            );
            assert_eq!(fs::read(&cut_path).unwrap(), &bytes[..cut], "left as it was");
            continue;
        };
        let mut opened = opened.unwrap();
        assert_eq!(opened.recipe(), expected, "cut at {cut}");
        assert_eq!(opened.cut_bytes(), cut as u64 - end);
        assert_eq!(fs::metadata(&cut_path).unwrap().len(), *end);
        opened.append(&[entry(8192, 512)]).unwrap();
        let reloaded = RecipeLog::load(&cut_path).unwrap();
        assert_eq!(&reloaded, opened.recipe());
        assert!(entries(&reloaded).contains(&entry(8192, 512)));
    }
}

#[test]
fn one_damaged_byte_ends_the_log_before_its_record() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    log.append(&[entry(0, 512)]).unwrap();
    let first_end = fs::metadata(&path).unwrap().len() as usize;
    log.append(&[entry(512, 512)]).unwrap();
    let second_end = fs::metadata(&path).unwrap().len() as usize;
    log.append(&[entry(1024, 512)]).unwrap();
    let bytes = fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        let read = Recipe::read(&damaged[..]).ok();
        let expected = match at {
            _ if at < 64 => None,
            _ if at < first_end => Some(0),
            _ if at < second_end => Some(1),
            _ => Some(2),
        };
        assert_eq!(read.map(|recipe| recipe.len()), expected, "byte {at}");
    }
}

#[test]
fn a_record_counts_only_where_it_was_written() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    log.append(&[entry(0, 512)]).unwrap();
    let one = fs::read(&path).unwrap();
    let twice = [&one[..], &one[64..]].concat();
    fs::write(&path, twice).unwrap();
    let reopened = RecipeLog::open(&path).unwrap();
    assert_eq!(reopened.cut_bytes(), one.len() as u64 - 64);
}

#[test]
fn a_newer_version_is_refused_and_left_alone() {
    let (_dir, path) = place();
    RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 3;
    let check = *blake3::hash(&bytes[..32]).as_bytes();
    bytes[32..].copy_from_slice(&check);
    fs::write(&path, &bytes).unwrap();
    let error = RecipeLog::open(&path).unwrap_err();
    assert!(matches!(
        error,
        RecipeError::Unreadable { reason: HeaderError::Version { found: 3 }, .. }
    ));
    assert!(error.to_string().ends_with(
        "disk.qcow2.longhaul-recipe: its format is version 3, this release reads version 2: \
         remove the file to start anew"
    ));
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn nothing_outside_the_image_is_recorded() {
    let (_dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    let before = fs::read(&path).unwrap();
    for bad in
        [entry(IMAGE_BYTES - 1, 2), entry(u64::MAX, 1), entry(0, 0), entry(0, (256 << 10) + 1)]
    {
        let error = log.append(&[entry(0, 1), bad]).unwrap_err();
        assert!(matches!(error, RecipeError::OutsideImage { .. }), "{error}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "that is what must be refused")]
    let bad_ranges: [Range<u64>; 3] = [5..5, 6..5, 0..IMAGE_BYTES + 1];
    for bad in bad_ranges {
        let error = log.void(Some(bad)).unwrap_err();
        assert!(matches!(error, RecipeError::OutsideImage { .. }), "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    assert!(log.recipe().is_empty());
}

#[test]
fn a_log_of_superseded_entries_is_compacted_at_a_sync() {
    let (dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    let mut longest = 0;
    for round in 0..50 {
        let entries: Vec<RecipeEntry> = (0..100).map(|n| entry(n * 100, 100 - round)).collect();
        log.append(&entries).unwrap();
        log.sync().unwrap();
        longest = longest.max(fs::metadata(&path).unwrap().len());
    }
    // 1024 items may be logged before it is worth it, and one round comes on top.
    assert!(longest < 64 + 1200 * 44, "{longest}");
    assert_eq!(&RecipeLog::load(&path).unwrap().len(), &100);
    assert_eq!(entries(&RecipeLog::load(&path).unwrap()), entries(log.recipe()));
    log.append(&[entry(50_000, 100)]).unwrap();
    log.mark_complete(1, identity()).unwrap();
    assert_eq!(RecipeLog::load(&path).unwrap(), *log.recipe());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn a_crash_while_compacting_leaves_the_old_log() {
    let (dir, path) = place();
    let mut log = RecipeLog::create(&path, IMAGE_BYTES).unwrap();
    log.append(&[entry(0, 512)]).unwrap();
    let fresh = dir.path().join("disk.qcow2.longhaul-recipe.new");
    fs::write(&fresh, b"LHRECI").unwrap();
    let mut reopened = RecipeLog::open(&path).unwrap();
    assert_eq!(entries(reopened.recipe()), [entry(0, 512)]);
    reopened.compact().unwrap();
    assert!(!fresh.exists());
    assert_eq!(entries(&RecipeLog::load(&path).unwrap()), [entry(0, 512)]);
}

#[derive(Debug, Clone)]
enum Op {
    Append(Vec<(u64, u32)>),
    Void(u64, u64),
    Zeros(u64, u64),
    Sample(u64),
    Complete(u64),
    Compact,
    Restart,
    Tear(u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::collection::vec((0_u64..3900, 1_u32..100), 0..20).prop_map(Op::Append),
        2 => (0_u64..3900, 1_u64..100).prop_map(|(start, len)| Op::Void(start, len)),
        2 => (0_u64..3900, 1_u64..100).prop_map(|(start, len)| Op::Zeros(start, len)),
        2 => (0_u64..4096).prop_map(Op::Sample),
        1 => any::<u64>().prop_map(Op::Complete),
        1 => Just(Op::Compact),
        1 => Just(Op::Restart),
        1 => any::<u8>().prop_map(Op::Tear),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The model is an image of 4096 bytes, each with the number of the write that it came from: 0 if
    /// nothing is known of it.
    #[test]
    fn the_list_is_what_the_writes_left(ops in prop::collection::vec(op(), 1..40)) {
        let (_dir, path) = place();
        let mut log = RecipeLog::create(&path, 4096).unwrap();
        let mut image = [0_usize; 4096];
        let mut writes = vec![None];
        let mut samples = BTreeMap::new();
        let mut complete = None;
        for op in ops {
            match op {
                Op::Append(parts) => {
                    let list: Vec<RecipeEntry> =
                        parts.iter().map(|(offset, len)| entry(*offset, *len)).collect();
                    log.append(&list).unwrap();
                    for entry in &list {
                        samples.retain(|offset, _| !entry.range().unwrap().contains(offset));
                        image[entry.offset as usize..][..entry.len as usize].fill(writes.len());
                        writes.push(Some(*entry));
                    }
                    if !list.is_empty() {
                        complete = None;
                    }
                }
                Op::Void(start, len) => {
                    log.void(Some(start..start + len)).unwrap();
                    image[start as usize..][..len as usize].fill(0);
                    samples.retain(|offset, _| !(start..start + len).contains(offset));
                    complete = None;
                }
                Op::Zeros(start, len) => {
                    log.append_zeros(Some(start..start + len)).unwrap();
                    image[start as usize..][..len as usize].fill(ZERO);
                    samples.retain(|offset, _| !(start..start + len).contains(offset));
                    complete = None;
                }
                Op::Sample(offset) => {
                    let id = ShortId::from_bytes(samples.len().to_le_bytes());
                    log.append_samples(&[Sample { offset, id }]).unwrap();
                    samples.insert(offset, id);
                    complete = None;
                }
                Op::Complete(generation) => {
                    log.mark_complete(generation, identity()).unwrap();
                    complete = Some(generation);
                }
                Op::Compact => log.compact().unwrap(),
                Op::Restart => log = RecipeLog::open(&path).unwrap(),
                Op::Tear(garbage) => {
                    let mut bytes = fs::read(&path).unwrap();
                    bytes.extend(std::iter::repeat_n(garbage, usize::from(garbage)));
                    fs::write(&path, bytes).unwrap();
                    log = RecipeLog::open(&path).unwrap();
                    prop_assert_eq!(log.cut_bytes(), u64::from(garbage));
                }
            }
            prop_assert_eq!(log.complete().map(|completed| completed.generation), complete);
        }
        let mut expected: Vec<RecipeEntry> = writes
            .iter()
            .enumerate()
            .filter_map(|(number, entry)| entry.map(|entry| (number, entry)))
            .filter(|(number, entry)| {
                let bytes = &image[entry.offset as usize..][..entry.len as usize];
                bytes.iter().all(|from| from == number)
            })
            .map(|(_, entry)| entry)
            .collect();
        expected.sort_by_key(|entry| entry.offset);
        for recipe in [log.recipe(), &RecipeLog::load(&path).unwrap()] {
            let zeros: Vec<u64> = recipe.zeros().flatten().collect();
            let is_zero = |at: &u64| image[*at as usize] == ZERO;
            prop_assert_eq!(zeros, (0..4096).filter(is_zero).collect::<Vec<u64>>());
            let listed: BTreeMap<u64, ShortId> =
                recipe.samples().map(|sample| (sample.offset, sample.id)).collect();
            prop_assert_eq!(&listed, &samples);
            let whole = expected.iter().map(|entry| u64::from(entry.len)).sum::<u64>()
                + recipe.zeros().map(|range| range.end - range.start).sum::<u64>();
            prop_assert_eq!(recipe.known(&(0..4096)).is_some(), whole == 4096);
        }
        prop_assert_eq!(entries(log.recipe()), &expected[..]);
        prop_assert_eq!(entries(&RecipeLog::load(&path).unwrap()), expected);
    }

    #[test]
    fn garbage_behind_a_header_is_no_log(garbage in prop::collection::vec(any::<u8>(), 0..300)) {
        let (_dir, path) = place();
        RecipeLog::create(&path, IMAGE_BYTES).unwrap();
        let header = fs::read(&path).unwrap();
        let recipe = Recipe::read(&[&header[..], &garbage].concat()[..]).unwrap();
        prop_assert!(recipe.is_empty() && recipe.complete().is_none());
        prop_assert!(Recipe::read(&garbage[..]).is_err());
    }
}
