//! Cuts do not depend on how an extent was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul_dedup::chunker::{ChunkerParams, StreamChunker, chunks};

fuzz_target!(|input: (Vec<u8>, Vec<u16>)| {
    let (data, blocks) = input;
    let params = ChunkerParams::new(64, 256, 1024).expect("small but usable sizes");
    let mut chunker = StreamChunker::new(params);
    let mut cuts = Vec::new();
    let mut rest = &data[..];
    for block in blocks {
        let (head, tail) = rest.split_at(rest.len().min(usize::from(block)));
        cuts.extend(chunker.push(head));
        rest = tail;
    }
    cuts.extend(chunker.push(rest));
    cuts.extend(chunker.finish());
    assert_eq!(cuts, chunks(params, &data).collect::<Vec<_>>());
});
