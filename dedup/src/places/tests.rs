//! The index against a list of what it was told, through crashes at every step and damage everywhere.

use std::{collections::BTreeMap, fs, path::Path};

use proptest::prelude::*;

use super::{
    format::{Manifest, PAGE_BYTES, decode_page, decode_run_header, encode_page},
    store::STEPS_LEFT,
    *,
};
use crate::{
    blocks::scan,
    recipe::{ImageIdentity, RecipeEntry, Sample},
};

fn identity(version: u64) -> ImageIdentity {
    ImageIdentity { size: 1 << 30, mtime_ns: version.cast_signed(), inode: 7 }
}

fn wanted(name: &str, version: u64) -> Wanted {
    let path = Path::new("/images").join(name);
    Wanted { path, bytes: 1 << 30, identity: identity(version), record: None }
}

fn piece(n: u64) -> RecipeEntry {
    RecipeEntry { offset: n * 65536, len: 65536, id: ChunkId::of(&n.to_le_bytes()) }
}

fn add(
    places: &Places,
    name: &str,
    pieces: impl IntoIterator<Item = u64>,
) -> Result<(), PlacesError> {
    let mut builder = places.builder();
    for n in pieces {
        builder.add_piece(&piece(n))?;
    }
    places.finish(builder, wanted(name, 1))
}

/// Names of images that are said to have a piece at its place.
fn found(snapshot: &Snapshot, n: u64) -> Vec<String> {
    let places = snapshot.lookup(piece_key(&piece(n).id));
    let mut names: Vec<String> = places
        .iter()
        .map(|place| {
            assert_eq!((place.offset, place.blocks), (n * 65536, 16));
            let image = snapshot.image(place.image).unwrap();
            image.path.file_name().unwrap().to_str().unwrap().to_owned()
        })
        .collect();
    names.sort();
    names
}

fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_an_image_holds_is_found_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..500_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let scan = scan(&[(1 << 20, data.into())]);
    assert!(scan.pieces.len() > 10 && scan.samples().count() > 10);
    let places = Places::open(dir.path()).unwrap();
    let mut builder = places.builder();
    builder.add_scan(&scan).unwrap();
    places.finish(builder, wanted("a", 1)).unwrap();
    for places in [places, Places::open(dir.path()).unwrap()] {
        assert!(!places.was_lost());
        let snapshot = places.snapshot();
        for piece in &scan.pieces {
            let place = snapshot.lookup(piece_key(&piece.id))[0];
            assert_eq!(
                (place.offset, u32::from(place.blocks) * 4096),
                (piece.offset, piece.len.next_multiple_of(4096))
            );
            assert_eq!(snapshot.image(place.image).unwrap().identity, identity(1));
        }
        for Sample { offset, id } in scan.samples() {
            let places = snapshot.lookup(block_key(id));
            assert!(places.contains(&Place { image: places[0].image, offset, blocks: 0 }));
        }
        assert_eq!(snapshot.lookup(1), []);
    }
}

#[test]
fn more_than_fits_in_memory_is_spilled_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::open(dir.path()).unwrap();
    let many = build::BUFFER_ENTRIES as u64 * 11 + 5;
    add(&places, "large", (0..many).rev()).unwrap();
    add(&places, "small", [3, 5]).unwrap();
    let snapshot = places.snapshot();
    assert_eq!(snapshot.summary().entries, many + 2);
    for n in 0..many {
        let expected: &[&str] = if n == 3 || n == 5 { &["large", "small"] } else { &["large"] };
        assert_eq!(found(&snapshot, n), expected);
    }
    assert_eq!(files(dir.path()).len(), 1 + snapshot.summary().runs as usize);
    // A builder that is given up leaves nothing.
    let mut builder = places.builder();
    (0..2000).for_each(|n| builder.add_piece(&piece(n)).unwrap());
    let with_spills = files(dir.path()).len();
    drop(builder);
    assert!(files(dir.path()).len() < with_spills);
}

#[test]
fn entries_of_dropped_images_are_not_found_and_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places::open(dir.path()).unwrap();
    for image in 0..8_u64 {
        add(&places, &image.to_string(), image * 100..image * 100 + 100).unwrap();
    }
    let old = places.snapshot();
    places.drop_images(|image| image.path.ends_with("7")).unwrap();
    let snapshot = places.snapshot();
    assert!(found(&snapshot, 700).is_empty());
    assert_eq!(found(&snapshot, 699), ["6"]);
    assert_eq!(snapshot.summary().images, 7);
    places.drop_images(|image| !image.path.ends_with("0")).unwrap();
    let summary = places.snapshot().summary();
    assert_eq!((summary.images, summary.entries, summary.dropped_entries), (1, 100, 0));
    // Who looked into it before goes on doing so.
    assert_eq!(found(&old, 700), ["7"]);
    // The same path again replaces what was there.
    add(&places, "0", [900]).unwrap();
    let snapshot = places.snapshot();
    assert!(found(&snapshot, 0).is_empty());
    assert_eq!(found(&snapshot, 900), ["0"]);
    assert_eq!(snapshot.summary().images, 1);
}

#[test]
fn a_crash_at_any_step_leaves_the_old_index_or_the_new_one() {
    for steps in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(dir.path()).unwrap();
        add(&places, "a", 0..100).unwrap();
        add(&places, "b", 50..150).unwrap();
        STEPS_LEFT.set(Some(steps));
        let result = add(&places, "a", 200..300);
        STEPS_LEFT.set(None);
        let ended = result.is_ok();
        // The process that goes on after a failure is right, too, and so is its next change.
        let here = places.snapshot();
        assert_eq!(found(&here, 120), ["b"]);
        assert!(found(&here, 0) == ["a"] || found(&here, 200) == ["a"]);
        drop(places);
        let places = Places::open(dir.path()).unwrap();
        assert!(!places.was_lost());
        let snapshot = places.snapshot();
        let old = found(&snapshot, 0) == ["a"] && found(&snapshot, 200).is_empty();
        let new = found(&snapshot, 0).is_empty() && found(&snapshot, 200) == ["a"];
        assert!(old != new, "after {steps} steps");
        assert!(new || !ended);
        assert_eq!(found(&snapshot, 120), ["b"]);
        assert_eq!(files(dir.path()).len(), 1 + snapshot.summary().runs as usize, "{steps}");
        add(&places, "c", 300..400).unwrap();
        assert_eq!(found(&places.snapshot(), 399), ["c"]);
        assert_eq!(places.check(|_| ()).unwrap().images, Vec::<PathBuf>::new());
        if ended {
            assert!(steps >= 6, "the steps are passed");
            return;
        }
    }
    panic!("a change never ended");
}

#[test]
fn a_change_that_failed_can_be_made_again_by_the_same_process() {
    for steps in 0..9 {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::open(dir.path()).unwrap();
        add(&places, "a", 0..100).unwrap();
        STEPS_LEFT.set(Some(steps));
        let _ = add(&places, "b", 200..300);
        STEPS_LEFT.set(None);
        add(&places, "b", 400..500).unwrap();
        for places in [places, Places::open(dir.path()).unwrap()] {
            let snapshot = places.snapshot();
            assert_eq!(found(&snapshot, 99), ["a"]);
            assert_eq!(found(&snapshot, 499), ["b"]);
            assert!(found(&snapshot, 299).is_empty());
        }
    }
}

#[test]
fn an_index_of_another_release_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = Manifest::default().encode();
    bytes[8] = 9;
    let body = bytes.len() - 32;
    let check = *blake3::hash(&bytes[..body]).as_bytes();
    bytes[body..].copy_from_slice(&check);
    fs::write(dir.path().join("manifest"), &bytes).unwrap();
    let error = Places::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("version 9"), "{error}");
    assert_eq!(fs::read(dir.path().join("manifest")).unwrap(), bytes);
}

/// Two images of some pages each, in two runs; what is in them by name.
fn two_runs(dir: &Path) -> BTreeMap<&'static str, std::ops::Range<u64>> {
    let places = Places::open(dir).unwrap();
    let content = BTreeMap::from([("large", 0..2000), ("small", 1900..2150)]);
    for (name, pieces) in &content {
        add(&places, name, pieces.clone()).unwrap();
    }
    assert_eq!(places.snapshot().summary().runs, 2);
    content
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn damage_costs_hints_and_is_put_right(
        file: prop::sample::Index,
        at: prop::sample::Index,
        kind in 0_u8..4,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let content = two_runs(dir.path());
        let names = files(dir.path());
        let path = dir.path().join(&names[file.index(names.len())]);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        match kind {
            0 => bytes[at] ^= 0x10,
            1 => bytes.truncate(at),
            2 => bytes[at..].fill(0),
            _ => bytes.clear(),
        }
        if kind == 3 {
            fs::remove_file(&path).unwrap();
        } else {
            fs::write(&path, &bytes).unwrap();
        }
        let places = Places::open(dir.path()).unwrap();
        // Whatever is found was put there: `found` looks at the place, and here at the image.
        let right = |snapshot: &Snapshot, n: u64| {
            found(snapshot, n).iter().all(|name| content[name.as_str()].contains(&n))
        };
        prop_assert!((0..2200).all(|n| right(&places.snapshot(), n)));
        let checked = places.check(|_| ()).unwrap();
        // What lacks something is named, and with it read again everything is there.
        let lacking = content.iter().filter(|(name, pieces)| {
            let snapshot = places.snapshot();
            let mut pieces = pieces.start..pieces.end;
            pieces.any(|n| !found(&snapshot, n).iter().any(|found| found == *name))
        });
        for (name, pieces) in lacking {
            let known = places.snapshot();
            let known = known.images().any(|(image, _)| image.path.ends_with(name));
            prop_assert!(!known || checked.images.iter().any(|path| path.ends_with(name)));
            add(&places, name, pieces.clone()).unwrap();
        }
        drop(places);
        let places = Places::open(dir.path()).unwrap();
        let again = places.check(|_| ()).unwrap();
        prop_assert_eq!((again.damaged_pages, again.damaged_runs), (0, 0));
        let snapshot = places.snapshot();
        for n in 0..2200 {
            let expected: Vec<&str> = content
                .iter()
                .filter(|(_, pieces)| pieces.contains(&n))
                .map(|(name, _)| *name)
                .collect();
            prop_assert_eq!(found(&snapshot, n), expected);
        }
    }

    #[test]
    fn it_answers_like_a_list(
        images in prop::collection::vec((0_u8..6, 0_u64..600, 1_u64..400, any::<bool>()), 1..14),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut places = Places::open(dir.path()).unwrap();
        let mut model: BTreeMap<String, std::ops::Range<u64>> = BTreeMap::new();
        for (name, first, count, restart) in images {
            let name = name.to_string();
            if count < 40 {
                places.drop_images(|image| image.path.ends_with(&name)).unwrap();
                model.remove(&name);
            } else {
                add(&places, &name, first..first + count).unwrap();
                model.insert(name, first..first + count);
            }
            if restart {
                drop(places);
                places = Places::open(dir.path()).unwrap();
            }
        }
        let snapshot = places.snapshot();
        let summary = snapshot.summary();
        prop_assert_eq!(summary.images, model.len() as u64);
        prop_assert!(summary.dropped_entries * 4 <= summary.entries);
        for n in 0..1000 {
            let having = model.iter().filter(|(_, pieces)| pieces.contains(&n));
            let expected: Vec<String> = having.map(|(name, _)| name.clone()).collect();
            let found = found(&snapshot, n);
            // Beyond the limit any of them will do.
            prop_assert!(found.iter().all(|name| expected.contains(name)));
            prop_assert!(found.len() == expected.len() || (found.len() <= expected.len()
                && expected.len() > MAX_PLACES - 2), "{:?} {:?}", found, expected);
        }
    }

    #[test]
    fn entries_keep_what_they_are_made_of(key: u64, image: u16, block in 0_u64..1 << 40, blocks in 0_u8..=64) {
        let place = Place { image, offset: block * 4096, blocks };
        let entry = Entry::new(key, place).unwrap();
        prop_assert_eq!((entry.key, entry.place()), (key, place));
        prop_assert_eq!(entry.of_image(3).place(), Place { image: 3, ..place });
        prop_assert_eq!(Entry::new(key, Place { offset: 1, ..place }), None);
        prop_assert_eq!(Entry::new(key, Place { offset: 1 << 52, ..place }), None);
        prop_assert_eq!(Entry::new(key, Place { blocks: 65, ..place }), None);
        let page = encode_page(5, 6, &[entry]);
        prop_assert_eq!(decode_page(5, 6, &page, 1).unwrap().collect::<Vec<_>>(), [entry]);
        prop_assert!(decode_page(5, 7, &page, 1).is_none());
        prop_assert!(decode_page(4, 6, &page, 1).is_none());
        prop_assert!(decode_page(5, 6, &page, 256).is_none());
        prop_assert!(decode_run_header(&page).is_none());
    }

    #[test]
    fn a_manifest_is_what_it_was_or_is_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..PAGE_BYTES),
        at: prop::sample::Index,
    ) {
        prop_assert!(Manifest::decode(&bytes).is_err());
        let image = Indexed {
            path: "/images/a".into(),
            bytes: 9,
            identity: identity(3),
            record: Some(identity(4)),
            whole: true,
        };
        let dropped = Indexed { path: Default::default(), record: None, whole: false, ..image.clone() };
        let manifest = Manifest {
            next_run: 12,
            images: [(2, image), (9, dropped)].into(),
            runs: vec![RunFacts { id: 11, images: [(2, 5), (9, 1 << 30)].into() }],
        };
        let mut bytes = manifest.encode();
        prop_assert_eq!(Manifest::decode(&bytes), Ok(manifest));
        let at = at.index(bytes.len());
        bytes[at] ^= 1;
        prop_assert!(Manifest::decode(&bytes).is_err());
    }
}
