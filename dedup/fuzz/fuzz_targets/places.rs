//! The readers of the index's files: the manifest, a run's header and a page of it. Checks are hashes, which
//! a mutator cannot guess: seed the corpus with real files to get behind them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul_dedup::places::{Entry, Manifest, decode_page, decode_run_header};

fuzz_target!(|input: &[u8]| {
    if let Ok(manifest) = Manifest::decode(input) {
        assert_eq!(manifest.encode(), input);
        for run in &manifest.runs {
            assert!(run.id < manifest.next_run);
            assert!(run.images.keys().all(|image| manifest.images.contains_key(image)));
        }
    }
    let Some((page, rest)) = input.split_first_chunk::<4096>() else { return };
    let _ = decode_run_header(page);
    let number = |at: usize| rest.get(at).copied().map_or(0, u64::from);
    if let Some(entries) = decode_page(number(0), number(1), page, number(2) as usize) {
        for entry in entries {
            let place = entry.place();
            assert!(place.offset.is_multiple_of(4096));
            assert!(Entry::new(entry.key, place).is_none_or(|again| again == entry));
        }
    }
});
