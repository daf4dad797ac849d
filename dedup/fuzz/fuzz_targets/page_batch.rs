//! The decoder of page batches, and rebuilding from what it accepts.
//!
//! The first byte says whether the input is a whole message or the records of a stored one: only
//! the latter gets a mutator past the compression.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use longhaul_dedup::{
    compress::{Compressor, Level},
    pagebatch::{ContentHasher, Limits, decode, encode},
    pages::Page,
};

const LIMITS: Limits<'_> = Limits { records: 64, region_pages: &[100, 0, 1 << 40] };

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let message = if choice % 2 == 0 {
        rest.to_vec()
    } else {
        let mut message = vec![2];
        message.extend_from_slice(ContentHasher::new().finish().as_bytes());
        let records = Bytes::copy_from_slice(rest);
        Compressor::new().compress(Level::Store, records).encode_into(&mut message);
        message
    };
    let Ok(batch) = decode(&message.into(), &LIMITS) else { return };
    let again = encode(batch.records(), batch.content_hash(), &mut Compressor::new(), Level::Store);
    assert_eq!(decode(&again, &LIMITS).as_ref(), Ok(&batch));
    let _ = batch.clone().rebuild(|_| None, |_| None);
    let like = |at: u64| Some(Page::from(&[at as u8; 4096]));
    let _ = batch.rebuild(|at| like(at.page), |at| like(at.block));
});
