//! A control stream as any peer may send it, in pieces as any network may deliver it: no panic, the
//! same frames however they are cut, and no more memory than a frame may have.
//!
//! `cargo +nightly fuzz run control`
//!
//! The first byte of the input chooses the size of the pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul_transport::fuzzing;

fuzz_target!(|input: &[u8]| {
    let Some((piece, stream)) = input.split_first() else { return };
    fuzzing::control_stream(stream, usize::from(*piece) + 1);
});
