//! Any bytes as QEMU's memory stream: no panic, the same events however they arrive, and never an
//! event that the writer refuses.
//!
//! `cargo +nightly fuzz run ramstream_parser fuzz/corpus/ramstream_parser fuzz/seeds/ramstream_parser`
//!
//! The first two bytes of the input choose the size of the pieces and where the parser gives up.

#![no_main]

use libfuzzer_sys::fuzz_target;
use longhaul::hypervisor::MemoryEvent;
use longhaul::hypervisor::qemu::ramstream::{Parser, Writer};

/// Events with neighbouring opaque ones joined, and whether the stream was whole.
fn parse(mut parser: Parser, stream: &[u8], piece: usize) -> (Vec<MemoryEvent>, bool) {
    let mut events = Vec::new();
    stream.chunks(piece).for_each(|bytes| parser.push(bytes, &mut events));
    let mut joined: Vec<MemoryEvent> = Vec::new();
    for event in events {
        match (joined.last_mut(), event) {
            (Some(MemoryEvent::Opaque(before)), MemoryEvent::Opaque(more)) => {
                *before = [&before[..], &more[..]].concat().into();
            }
            (_, event) => joined.push(event),
        }
    }
    (joined, parser.finish().is_ok())
}

fuzz_target!(|input: &[u8]| {
    let [piece, limit, stream @ ..] = input else { return };
    let parser = || match limit {
        255 => Parser::new(),
        limit => Parser::give_up_after(u64::from(*limit)),
    };
    let whole = parse(parser(), stream, usize::MAX);
    assert!(parse(parser(), stream, usize::from(*piece) + 1) == whole);

    let (mut writer, mut out) = (Writer::new(), Vec::new());
    writer.encode(&whole.0, &mut out).expect("what a parser gives out is legal");
    assert!(!whole.1 || writer.finish().is_ok());
});
