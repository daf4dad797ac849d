//! The reader of recipe files. Checks are hashes, which a mutator cannot guess: seed the corpus with
//! real files to get behind them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul_dedup::recipe::Recipe;

fuzz_target!(|input: &[u8]| {
    let Ok(recipe) = Recipe::read(input) else { return };
    let mut end = 0;
    for entry in recipe.entries() {
        let range = entry.range().expect("entries are checked when read");
        assert!(range.start >= end && range.end <= recipe.image_bytes());
        end = range.end;
    }
    let mut end = 0;
    for range in recipe.zeros() {
        assert!(range.start >= end && range.start < range.end && range.end <= recipe.image_bytes());
        end = range.end;
    }
    let known = recipe.known(&(0..recipe.image_bytes()));
    assert!(known.is_none_or(|pieces| pieces.len() == recipe.len()));
});
