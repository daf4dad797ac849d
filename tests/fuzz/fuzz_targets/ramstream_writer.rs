//! Any events as a peer may send them: no panic, here or in a parser that reads what was written, and
//! no more bytes than the events have.
//!
//! `cargo +nightly fuzz run ramstream_writer`

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use longhaul::hypervisor::qemu::ramstream::{Parser, Writer};
use longhaul::hypervisor::{MemoryEvent, MemoryLayout, PAGE_BYTES, Region};

/// What one event may add beside its own bytes: a section around it and a region's name.
const AROUND_MAX: usize = 300;

/// Takes events from the front of the input until it is used up.
fn events(mut input: &[u8]) -> Vec<MemoryEvent> {
    let mut events = Vec::new();
    while let [kind, a, b, rest @ ..] = input {
        input = rest;
        let (region, page) = (u16::from(a % 5), u64::from(*b));
        events.push(match kind % 8 {
            0 => {
                let regions = (0..a % 6).map(|n| Region {
                    name: if *b == 255 { String::new() } else { format!("r{}", n % (b % 7 + 1)) },
                    bytes: u64::from(*b) << (n * 12),
                });
                MemoryEvent::Layout(MemoryLayout {
                    section_id: u32::from(*b),
                    regions: regions.collect(),
                })
            }
            1 => {
                let len = usize::from(*a).min(rest.len());
                input = &rest[len..];
                MemoryEvent::Opaque(Bytes::copy_from_slice(&rest[..len]))
            }
            2 | 3 => MemoryEvent::Zero { region, page },
            4 => {
                let bytes = if *a == 255 { PAGE_BYTES - 1 } else { PAGE_BYTES };
                MemoryEvent::Page { region, page, content: vec![*b; bytes].into() }
            }
            5 => MemoryEvent::LastPass,
            6 => MemoryEvent::PagesDone,
            _ => MemoryEvent::NotUnderstood { reason: String::new() },
        });
    }
    events
}

fuzz_target!(|input: &[u8]| {
    let events = events(input);
    let (mut writer, mut out) = (Writer::new(), Vec::new());
    for event in &events {
        let before = out.len();
        if writer.encode(std::slice::from_ref(event), &mut out).is_err() {
            return;
        }
        let own = match event {
            MemoryEvent::Opaque(bytes) => bytes.len(),
            MemoryEvent::Page { content, .. } => content.len(),
            _ => 0,
        };
        assert!(out.len() - before <= own + AROUND_MAX);
    }
    Parser::new().push(&out, &mut Vec::new());
    let _ = writer.finish();
});
