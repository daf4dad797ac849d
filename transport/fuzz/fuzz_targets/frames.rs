//! The greeting, receipts and batch heads: the first byte chooses which one. No panic, and what is
//! understood is written back as the same bytes.
//!
//! `cargo +nightly fuzz run frames`
#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul_transport::fuzzing;

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    match choice % 3 {
        0 => fuzzing::greeting(bytes),
        1 => fuzzing::receipt(bytes),
        _ => fuzzing::batch_head(bytes),
    }
});
