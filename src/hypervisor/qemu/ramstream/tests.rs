//! Parser and writer against the oracle: what goes through both leaves the same guest behind.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::oracle::{Composer, MEMORY, Piece, REGIONS, VFIO, load};
use super::*;
use crate::hypervisor::{MemoryEvent, MemoryLayout, Region};

/// Parses in pieces of these sizes, in turn; neighbouring opaque events are joined, as their
/// borders are the only thing that the pieces may decide.
fn parse(
    mut parser: Parser,
    stream: &[u8],
    sizes: &[usize],
) -> (Vec<MemoryEvent>, Result<(), StreamCut>) {
    let mut events = Vec::new();
    let (mut rest, mut sizes) = (stream, sizes.iter().cycle());
    while !rest.is_empty() {
        let size = (*sizes.next().unwrap()).clamp(1, rest.len());
        parser.push(&rest[..size], &mut events);
        rest = &rest[size..];
    }
    let mut joined: Vec<MemoryEvent> = Vec::new();
    for event in events {
        match (joined.last_mut(), event) {
            (Some(MemoryEvent::Opaque(before)), MemoryEvent::Opaque(more)) => {
                assert!(more.len() <= OPAQUE_BYTES_MAX);
                *before = [&before[..], &more[..]].concat().into();
            }
            (_, event) => joined.push(event),
        }
    }
    (joined, parser.finish())
}

fn write(events: &[MemoryEvent], per_call: usize) -> Vec<u8> {
    let (mut writer, mut out) = (Writer::new(), Vec::new());
    for some in events.chunks(per_call) {
        writer.encode(some, &mut out).unwrap();
    }
    writer.finish().unwrap();
    out
}

/// The last version of each page only, in an order that `seed` chooses, as a migration may send
/// them: before the first event that waits for all pages.
fn supersede(events: Vec<MemoryEvent>, seed: u64) -> Vec<MemoryEvent> {
    let mut staged = std::collections::BTreeMap::new();
    let mut out = Vec::new();
    for event in events {
        match event {
            MemoryEvent::Zero { region, page } | MemoryEvent::Page { region, page, .. } => {
                let scattered = (page ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                staged.insert((scattered, region, page), event);
            }
            MemoryEvent::NotUnderstood { .. } | MemoryEvent::PagesDone => {
                out.extend(std::mem::take(&mut staged).into_values());
                out.push(event);
            }
            other => out.push(other),
        }
    }
    out
}

fn record() -> impl Strategy<Value = (u16, u64, u8)> {
    (0..REGIONS.len() as u16)
        .prop_flat_map(|region| (Just(region), 0..REGIONS[usize::from(region)].1, 0..4u8))
}

/// A body that looks like the end of its section and the beginning of another, short of having a
/// whole page record of memory: nothing but the body's own length could tell that apart.
fn nasty() -> impl Strategy<Value = Vec<u8>> {
    let footer = [0x7E, 0, 0, 0, VFIO as u8];
    let word = prop_oneof![
        Just(footer.to_vec()),
        Just([&footer[..], &[0x7E]].concat()),
        Just([&footer[..], &[3, 0, 0]].concat()),
        Just([&footer[..], &[2, 0, 0, 0, 77]].concat()),
        Just([&footer[..], &[8, 0, 9, 0, 0]].concat()),
        Just([&footer[..], &[8, 0, 11, 0, 0], &[0x55; 9]].concat()),
        Just([&footer[..], &[2, 0, 0, 0, MEMORY as u8]].concat()),
        Just([&footer[..], &[3, 0, 0, 0, MEMORY as u8, 0, 0, 0, 0, 0, 0, 0, 0x40]].concat()),
        vec(any::<u8>(), 0..40),
    ];
    vec(word, 0..4).prop_map(|words| words.concat())
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        9 => vec(record(), 0..12).prop_map(Piece::Pages),
        1 => nasty().prop_map(Piece::Other),
        1 => Just(Piece::Command),
    ]
}

/// A stream and what it was composed of.
#[derive(Clone)]
struct Stream(Vec<u8>, String);

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

fn stream() -> impl Strategy<Value = Stream> {
    (nasty(), vec(piece(), 0..8), vec(record(), 0..12), vec(any::<u8>(), 0..200)).prop_map(
        |(setup, pieces, last, tail)| {
            let shown = format!("{setup:?} {pieces:?} {last:?} {tail:?}");
            Stream(Composer::stream(&setup, &pieces, &last, &tail), shown)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn pieces_change_nothing(Stream(stream, _) in stream(), sizes in vec(1..9000usize, 1..20), limit in 0..200u64) {
        let whole = parse(Parser::give_up_after(limit), &stream, &[stream.len()]);
        prop_assert!(parse(Parser::give_up_after(limit), &stream, &sizes) == whole);
        prop_assert!(parse(Parser::give_up_after(limit), &stream, &[1]) == whole);
    }

    #[test]
    fn the_same_guest_is_left_behind(Stream(stream, _) in stream(), seed in any::<u64>(), per_call in 1..50usize) {
        let (events, end) = parse(Parser::new(), &stream, &[4096]);
        prop_assert_eq!(end, Ok(()));
        let expected = load(&stream);
        prop_assert!(load(&write(&events, per_call)) == expected);
        prop_assert!(load(&write(&supersede(events, seed), per_call)) == expected);
    }

    #[test]
    fn giving_up_anywhere_leaves_the_same_guest(
        Stream(stream, _) in stream(), limit in 0..200u64, seed in any::<u64>(), per_call in 1..50usize,
    ) {
        let (events, end) = parse(Parser::give_up_after(limit), &stream, &[3000]);
        prop_assert_eq!(end, Ok(()));
        let expected = load(&stream);
        prop_assert!(load(&write(&events, per_call)) == expected);
        prop_assert!(load(&write(&supersede(events, seed), per_call)) == expected);
    }

    #[test]
    fn a_cut_is_never_an_end(Stream(stream, _) in stream(), cut in any::<prop::sample::Index>(), limit in 0..300u64) {
        let len = cut.index(stream.len());
        let (_, end) = parse(Parser::give_up_after(limit), &stream[..len], &[1000]);
        prop_assert!(end.is_err());
    }

    #[test]
    fn damage_is_harmless(
        Stream(mut stream, _) in stream(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        sizes in vec(1..5000usize, 1..9),
    ) {
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let (events, _) = parse(Parser::new(), &stream, &sizes);
        prop_assert!(events == parse(Parser::new(), &stream, &[stream.len()]).0);
        // What a parser gives out, a writer accepts.
        let mut out = Vec::new();
        Writer::new().encode(&events, &mut out).unwrap();
    }

    #[test]
    fn any_bytes_are_harmless(bytes in vec(any::<u8>(), 0..600)) {
        let (events, _) = parse(Parser::new(), &bytes, &[7]);
        let kept: usize = events.iter().map(|event| match event {
            MemoryEvent::Opaque(bytes) => bytes.len(),
            _ => 0,
        }).sum();
        prop_assert!(kept <= bytes.len());
    }
}

fn sample() -> Vec<u8> {
    let pages = Piece::Pages(vec![(0, 1, 0), (0, 2, 7), (1, 0, 9), (1, 0, 8)]);
    Composer::stream(
        b"set up",
        &[Piece::Pages(vec![]), pages, Piece::Command],
        &[(1, 3, 5)],
        b"devices",
    )
}

#[test]
fn a_stream_is_told_in_order() {
    let (events, end) = parse(Parser::new(), &sample(), &[100]);
    assert_eq!(end, Ok(()));
    let page = |region, page, fill| MemoryEvent::Page {
        region,
        page,
        content: Bytes::from(vec![fill; 4096]),
    };
    let regions = REGIONS.map(|(name, pages)| Region { name: name.into(), bytes: pages * 4096 });
    let layout = MemoryLayout { section_id: MEMORY, regions: regions.to_vec() };
    let opaque = |event: &MemoryEvent| matches!(event, MemoryEvent::Opaque(_));
    assert!(opaque(&events[0]));
    assert_eq!(events[1], MemoryEvent::Layout(layout));
    assert!(opaque(&events[2]));
    assert_eq!(events[3], MemoryEvent::Zero { region: 0, page: 1 });
    assert_eq!(events[4..7], [page(0, 2, 7), page(1, 0, 9), page(1, 0, 8)]);
    assert!(opaque(&events[7]));
    assert_eq!(events[8..11], [MemoryEvent::LastPass, page(1, 3, 5), MemoryEvent::PagesDone]);
    assert!(opaque(&events[11]) && events.len() == 12);
}

#[test]
fn foreign_records_are_passed_through() {
    // XBZRLE, compressed, multifd's flush, RDMA's hook; a fill that is not zero; a wild address.
    for (flags, body) in
        [(0x60u64, 1u8), (0x120, 0), (0x200, 0), (0x80, 0), (0x22, 1), (0x22 | 1 << 40, 0)]
    {
        let mut stream = sample();
        let at = stream.windows(8).position(|head| head == 0x1002u64.to_be_bytes()).unwrap();
        // The first record becomes a foreign one; its region's name stays where it was.
        stream[at..at + 8].copy_from_slice(&(flags & !0x20).to_be_bytes());
        stream[at + 15] = body;
        let (events, _) = parse(Parser::new(), &stream, &[64]);
        let [.., MemoryEvent::NotUnderstood { .. }, MemoryEvent::Opaque(rest)] = &events[..] else {
            panic!("{flags:#x}: {} events", events.len());
        };
        let section = [&[2, 0, 0, 0, MEMORY as u8][..], &stream[at..]].concat();
        assert!(rest == &section, "{flags:#x}");
    }
}

#[test]
fn an_endless_start_is_given_up() {
    let endless = vec![0x55; (1 << 20) + 5000];
    let head = sample();
    let at = head.windows(6).position(|bytes| bytes == b"set up").unwrap();
    let stream = [&head[..at], &endless].concat();
    for size in [stream.len(), 999] {
        let (events, _) = parse(Parser::new(), &stream, &[size]);
        assert!(matches!(&events[3], MemoryEvent::NotUnderstood { .. }), "{} events", events.len());
        let MemoryEvent::Opaque(rest) = &events[4] else { panic!("no rest") };
        assert_eq!(rest.len(), 5002);
    }
}

#[test]
fn a_writer_refuses_what_no_stream_may_have() {
    let layout = || {
        let regions = vec![Region { name: "pc.ram".into(), bytes: 8192 }];
        MemoryEvent::Layout(MemoryLayout { section_id: 1, regions })
    };
    let zero = |page| MemoryEvent::Zero { region: 0, page };
    let opaque = || MemoryEvent::Opaque(Bytes::from_static(b"x"));
    let given_up = || MemoryEvent::NotUnderstood { reason: String::new() };
    let refused = |events: Vec<MemoryEvent>| {
        let (mut writer, mut out) = (Writer::new(), Vec::new());
        let (last, before) = events.split_last().unwrap();
        writer.encode(before, &mut out).unwrap();
        writer.encode(std::slice::from_ref(last), &mut out).unwrap_err().to_string()
    };
    use MemoryEvent::{LastPass, Page, PagesDone};
    let short = Page { region: 0, page: 0, content: Bytes::from_static(b"short") };
    let messages = [
        refused(vec![zero(0)]),
        refused(vec![LastPass]),
        refused(vec![layout(), layout()]),
        refused(vec![layout(), zero(1), zero(2)]),
        refused(vec![layout(), MemoryEvent::Zero { region: 1, page: 0 }]),
        refused(vec![layout(), short]),
        refused(vec![layout(), PagesDone]),
        refused(vec![layout(), LastPass, LastPass]),
        refused(vec![layout(), LastPass, opaque()]),
        refused(vec![layout(), LastPass, PagesDone, zero(0)]),
        refused(vec![layout(), given_up(), zero(0)]),
        refused(vec![given_up(), layout()]),
    ];
    assert_eq!(
        messages,
        [
            "the memory stream has a page before its layout",
            "the memory stream has a beginning of the last pass before its layout",
            "the memory stream has a layout between its layout and the last pass",
            "page 2 of region 0 is outside the memory layout",
            "page 0 of region 1 is outside the memory layout",
            "page 0 of region 0 has 5 bytes instead of 4096",
            "the memory stream has an end of all pages between its layout and the last pass",
            "the memory stream has a beginning of the last pass within the last pass",
            "the memory stream has bytes that are not pages within the last pass",
            "the memory stream has a page after its pages",
            "the memory stream has a page after its pages",
            "the memory stream has a layout after its pages",
        ]
    );
}

#[test]
fn sections_are_bounded_and_empty_ends_are_written() {
    let regions = vec![Region { name: "m".into(), bytes: 1 << 30 }];
    let mut events = vec![MemoryEvent::Layout(MemoryLayout { section_id: 1, regions })];
    let pages = u64::from(SECTION_RECORDS_MAX) + 1;
    events.extend((0..pages).map(|page| MemoryEvent::Zero { region: 0, page }));
    events.extend([MemoryEvent::LastPass, MemoryEvent::PagesDone]);
    let mut out = Vec::new();
    Writer::new().encode(&events, &mut out).unwrap();
    let sections = 3 * (5 + 8 + 5);
    let named = 2 * 2;
    assert_eq!(out.len(), pages as usize * 9 + sections + named);
    assert!(out.ends_with(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x7E, 0, 0, 0, 1]));
}

/// Prints what parser and writer do in a second; for an optimised build:
/// `cargo test --release --lib ramstream -- --ignored --nocapture`.
#[test]
#[ignore = "measures, checks nothing"]
fn throughput() {
    let pages: Vec<_> = (0..60u64).map(|page| (0, page, page as u8 + 1)).collect();
    let zeros: Vec<_> = (0..60u64).map(|page| (0, page, 0)).collect();
    for (name, records, times) in [("pages", pages, 200), ("zeros", zeros, 20_000)] {
        let stream = Composer::stream(b"", &vec![Piece::Pages(records); times], &[], b"");
        let rounds = 10;
        let (mut parsing, mut writing) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
        let mut out = Vec::new();
        for _ in 0..rounds {
            let (mut parser, mut writer) = (Parser::new(), Writer::new());
            for piece in stream.chunks(256 << 10) {
                let mut events = Vec::new();
                let begin = std::time::Instant::now();
                parser.push(piece, &mut events);
                parsing += begin.elapsed();
                let begin = std::time::Instant::now();
                out.clear();
                writer.encode(&events, &mut out).unwrap();
                writing += begin.elapsed();
            }
        }
        let bytes = (stream.len() * rounds) as f64;
        let rate = |time: std::time::Duration| bytes / time.as_secs_f64() / 1e9;
        println!("{name}: parse {:.2} GB/s, write {:.2} GB/s", rate(parsing), rate(writing));
    }
}
