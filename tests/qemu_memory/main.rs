//! Memory through real QEMUs: out of one, through parser and writer, into another.
//!
//! Each test prints what it skips if `LONGHAUL_QEMU_72` or `LONGHAUL_QEMU_100` is not set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod guest;

use std::collections::BTreeMap;

use guest::{Guest, Qemu, first_difference, is_left, qemus, told};
use longhaul::hypervisor::qemu::check::leaving;
use longhaul::hypervisor::qemu::memory::SourceMemory;
use longhaul::hypervisor::qemu::ramstream::{Parser, Writer};
use longhaul::hypervisor::{MemoryEvent, MemorySink, MemorySource, NotRunning};
use serde_json::json;
use tokio::task::JoinHandle;

/// A stream as QEMU wrote it, and the RAM that QEMU itself makes of it.
struct Capture {
    version: &'static str,
    stream: Vec<u8>,
    ram: Vec<u8>,
    counter: u32,
}

/// Reads to the end, in the background.
fn drain(
    mut memory: impl MemorySource + 'static,
) -> JoinHandle<Result<Vec<MemoryEvent>, longhaul::hypervisor::HypervisorError>> {
    tokio::spawn(async move {
        let mut events = Vec::new();
        while memory.next(&mut events).await? {}
        Ok(events)
    })
}

/// Reads until `until` is done, then hangs up.
async fn read_while<T>(mut memory: impl MemorySource, until: impl Future<Output = T>) -> T {
    let mut events = Vec::new();
    tokio::pin!(until);
    loop {
        tokio::select! {
            done = &mut until => return done,
            more = memory.next(&mut events) => assert!(more.unwrap()),
        }
    }
}

/// Waits until QEMU has gone over memory so many times.
async fn passes(source: &SourceMemory, wanted: u64) {
    while source.progress().await.unwrap().passes < wanted {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Lets a guest leave for nowhere and keeps what it sent.
async fn capture(qemu: &Qemu) -> Capture {
    let guest = Guest::boot(qemu).await;
    let source = guest.source();
    // A parser that understands nothing hands out the stream as it is.
    let memory = source.start_with(Parser::give_up_after(0)).await.unwrap();
    assert!(!is_left(&guest.path("memory-out")));
    // Slower than the guest dirties pages: QEMU passes over them again and again. Then it may pause
    // at this rate, so that pages are left for the last pass.
    source.set_rate(512 << 10).await.unwrap();
    let events = drain(memory);
    passes(&source, 4).await;
    guest.execute("migrate-set-parameters", json!({"downtime-limit": 2_000_000})).await;
    source.wait_paused().await.unwrap();
    source.finish().await.unwrap();
    source.wait_parked().await.unwrap();
    assert_eq!(guest.state().await, "postmigrate");
    let mut stream = Vec::new();
    for event in events.await.unwrap().unwrap() {
        match event {
            MemoryEvent::Opaque(bytes) => stream.extend_from_slice(&bytes),
            MemoryEvent::NotUnderstood { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let parked = guest.ram().await;
    guest.kill().await;

    let arrived = Guest::incoming(qemu).await;
    let mut sink = Box::new(arrived.target().open().await.unwrap());
    sink.apply(parse(&stream, Parser::give_up_after(0))).await.unwrap();
    sink.finish().await.unwrap();
    arrived.target().wait_loaded().await.unwrap();
    let (ram, counter) = (arrived.ram().await, arrived.counter().await);
    arrived.kill().await;
    if qemu.sends_all_writes() {
        assert_eq!(first_difference(&parked, &ram), None, "QEMU {} alone", qemu.version);
    }
    Capture { version: qemu.version, stream, ram, counter }
}

fn parse(stream: &[u8], mut parser: Parser) -> Vec<MemoryEvent> {
    let mut events = Vec::new();
    stream.chunks(100_000).for_each(|piece| parser.push(piece, &mut events));
    parser.finish().unwrap();
    events
}

/// Only the last version of each page, scattered, where the last pass is.
fn supersede(events: Vec<MemoryEvent>) -> Vec<MemoryEvent> {
    let (mut staged, mut out) = (BTreeMap::new(), Vec::new());
    for event in events {
        match event {
            MemoryEvent::Zero { region, page } | MemoryEvent::Page { region, page, .. } => {
                let scattered = (page ^ 0x5555).wrapping_mul(0x9E37_79B9_7F4A_7C15);
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

/// How often a page came that had come before.
fn repeated(events: &[MemoryEvent]) -> usize {
    let mut seen = std::collections::HashSet::new();
    let pages = events.iter().filter_map(|event| match event {
        MemoryEvent::Zero { region, page } | MemoryEvent::Page { region, page, .. } => {
            Some((*region, *page))
        }
        _ => None,
    });
    pages.filter(|page| !seen.insert(*page)).count()
}

/// Loads events into a fresh QEMU, `per_call` of them at a time, compares RAM and lets it run.
async fn arrives(capture: &Capture, to: &Qemu, events: &[MemoryEvent], per_call: usize, how: &str) {
    let what = format!("{how}, QEMU {} to {}", capture.version, to.version);
    let guest = Guest::incoming(to).await;
    let target = guest.target();
    let mut sink = Box::new(target.open().await.unwrap());
    for some in events.chunks(per_call) {
        if let Err(error) = sink.apply(some.to_vec()).await {
            panic!("{what}: {}: {}", told(&error), guest.words());
        }
    }
    sink.finish().await.unwrap();
    if let Err(error) = target.wait_loaded().await {
        panic!("{what}: {}: {}", told(&error), guest.words());
    }
    assert_eq!(first_difference(&capture.ram, &guest.ram().await), None, "{what}");
    assert_eq!(guest.state().await, "paused", "{what}");
    target.run().await.unwrap();
    assert_eq!(guest.state().await, "running", "{what}");
    guest.counts_beyond(capture.counter).await;
    guest.kill().await;
}

async fn captures() -> Vec<Capture> {
    let mut captures = Vec::new();
    for qemu in qemus() {
        captures.push(capture(&qemu).await);
    }
    captures
}

#[tokio::test]
async fn parsed_and_written_anew_it_is_the_same_guest() {
    for capture in captures().await {
        let events = parse(&capture.stream, Parser::new());
        let given_up = events.iter().find(|e| matches!(e, MemoryEvent::NotUnderstood { .. }));
        assert_eq!(given_up, None);
        assert!(repeated(&events) > 64, "the guest dirtied nothing meanwhile");
        let newest = supersede(events.clone());
        assert_eq!(repeated(&newest), 0);
        let mut written = Vec::new();
        Writer::new().encode(&newest, &mut written).unwrap();
        assert!(written.len() < capture.stream.len());
        for to in qemus() {
            arrives(&capture, &to, &events, events.len(), "as it came").await;
            arrives(&capture, &to, &newest, newest.len(), "newest only, scattered").await;
            arrives(&capture, &to, &newest, 5, "in sections of five").await;
        }
    }
}

#[tokio::test]
async fn giving_up_anywhere_is_still_the_same_guest() {
    for capture in captures().await {
        let last_pass = |events: &[MemoryEvent]| {
            let given_up = |e: &MemoryEvent| matches!(e, MemoryEvent::NotUnderstood { .. });
            let end = events.iter().position(given_up);
            end.map(|end| events[..end].contains(&MemoryEvent::LastPass))
        };
        // How many tokens there are, and which of them begins the last pass.
        let bisect = |is_before: &dyn Fn(u64) -> bool| {
            let (mut low, mut high) = (0, 1u64 << 20);
            while low < high {
                let middle = (low + high) / 2;
                if is_before(middle) { low = middle + 1 } else { high = middle }
            }
            low
        };
        let at = |limit| last_pass(&parse(&capture.stream, Parser::give_up_after(limit)));
        let all = bisect(&|limit| at(limit).is_some());
        let last = bisect(&|limit| at(limit) == Some(false));
        assert!(0 < last && last + 10 < all, "the last pass has no pages: {last} of {all}");

        // In the head, the layout, the first records, the middle, around the last pass (its header,
        // its first record, ..) and at its end (its last record, the mark after it, its footer).
        let mut limits = vec![0, 1, 2, 4, 8, 20, all / 2, all / 2 + 1];
        limits.extend([last - 3, last - 2, last - 1, last, last + 1, (last + all) / 2]);
        limits.extend([all - 3, all - 2, all - 1]);
        eprintln!("QEMU {}: {all} tokens, the last pass begins at {last}", capture.version);
        for to in qemus() {
            for limit in &limits {
                let events = parse(&capture.stream, Parser::give_up_after(*limit));
                assert!(last_pass(&events).is_some());
                let how = format!("given up after {limit} of {all} (last pass at {last})");
                arrives(&capture, &to, &supersede(events), 1000, &how).await;
            }
        }
    }
}

#[tokio::test]
async fn a_guest_moves_through_both_sockets() {
    for from in qemus() {
        for to in qemus() {
            let guest = Guest::boot(&from).await;
            let arriving = Guest::incoming(&to).await;
            let (source, target) = (guest.source(), arriving.target());
            let refused = target.run().await.unwrap_err();
            assert!(matches!(refused, NotRunning::NeverDid(_)), "{refused}");
            let refused = refused.into_error();
            assert!(told(&refused).contains("it was not started"), "{}", told(&refused));
            assert_eq!(arriving.state().await, "inmigrate");

            let mut sink = Box::new(target.open().await.unwrap());
            let mut memory = source.start().await.unwrap();
            // Slower than the guest dirties pages: it writes while its dirty marks are taken.
            source.set_rate(1 << 20).await.unwrap();
            let relay = tokio::spawn(async move {
                let mut events = Vec::new();
                while memory.next(&mut events).await.unwrap() {
                    sink.apply(std::mem::take(&mut events)).await.unwrap();
                }
                sink.finish().await.unwrap();
                memory.bytes_read()
            });
            passes(&source, 4).await;
            source.allow_switchover().await.unwrap();
            source.wait_paused().await.unwrap();
            assert_ne!(guest.state().await, "running");
            source.finish().await.unwrap();
            source.wait_parked().await.unwrap();
            assert!(relay.await.unwrap() > 256 << 10);
            target.wait_loaded().await.unwrap();
            // Also from a QEMU that misses writes: it has told its memory again, paused.
            assert_eq!(source.note().await.is_some(), !from.sends_all_writes());
            let (parked, arrived) = (guest.ram().await, arriving.ram().await);
            assert_eq!(first_difference(&parked, &arrived), None);
            let counter = arriving.counter().await;
            target.run().await.unwrap();
            arriving.counts_beyond(counter).await;
            // Again is harmless, and the source stays where it is.
            target.run().await.unwrap();
            assert_eq!(guest.state().await, "postmigrate");
            guest.kill().await;
            arriving.kill().await;
        }
    }
}

#[tokio::test]
async fn rolled_back_from_anywhere_the_guest_is_as_before() {
    for qemu in qemus() {
        let guest = Guest::boot(&qemu).await;
        let mut source = guest.source();
        source.rollback(true).await.unwrap();

        for ran in [true, false] {
            if !ran {
                guest.execute("stop", json!({})).await;
            }
            for stage in ["active", "allowed", "pre-switchover", "device", "parked"] {
                let what = format!("{stage}, QEMU {}, ran {ran}", qemu.version);
                let memory = source.start().await.unwrap();
                if stage == "active" {
                    // Nobody reads: the VM runs on and stays in the pass.
                    source.rollback(ran).await.unwrap();
                    let cut = drain(memory).await.unwrap().unwrap_err();
                    assert!(told(&cut).contains("was cut off"), "{what}: {}", told(&cut));
                } else if stage == "device" {
                    // The reader goes away in the middle of the last pass or the device state.
                    let finishing = async {
                        source.allow_switchover().await?;
                        source.wait_paused().await?;
                        source.finish().await
                    };
                    read_while(memory, finishing).await.unwrap();
                    source.rollback(ran).await.unwrap();
                } else {
                    let events = drain(memory);
                    source.allow_switchover().await.unwrap();
                    if stage != "allowed" {
                        source.wait_paused().await.unwrap();
                    }
                    if stage == "parked" {
                        source.finish().await.unwrap();
                        source.wait_parked().await.unwrap();
                        events.await.unwrap().unwrap();
                        let said = leaving(&guest.qmp).await.unwrap().join("; ");
                        assert!(said.contains("and is parked"), "{what}: {said}");
                        source.rollback(ran).await.unwrap();
                    } else {
                        // An agent that starts anew and knows nothing of this.
                        guest.source().rollback(ran).await.unwrap();
                        source = guest.source();
                        events.await.unwrap().unwrap_err();
                    }
                }
                let state = guest.state().await;
                if ran {
                    assert_eq!(state, "running", "{what}");
                    let counter = guest.counter().await;
                    guest.counts_beyond(counter).await;
                } else {
                    assert!(["paused", "postmigrate"].contains(&state.as_str()), "{what}: {state}");
                    if state == "postmigrate" {
                        let said = leaving(&guest.qmp).await.unwrap().join("; ");
                        assert!(said.contains("resume it first"), "{what}: {said}");
                        // As its owner would, to be able to go on from there.
                        guest.execute("cont", json!({})).await;
                        guest.execute("stop", json!({})).await;
                    }
                }
                source.rollback(ran).await.unwrap();
            }
        }
        guest.kill().await;
    }
}

#[tokio::test]
async fn a_refused_stream_is_told_in_qemus_words() {
    for qemu in qemus() {
        let capture = capture(&qemu).await;
        let mut events = parse(&capture.stream, Parser::new());
        // Device state that no device has.
        let done = events.iter().position(|event| *event == MemoryEvent::PagesDone).unwrap();
        events.insert(done + 1, MemoryEvent::Opaque(vec![4, 0xFF, 0xFF, 0xFF, 0xFF, 3].into()));
        let guest = Guest::incoming(&qemu).await;
        let target = guest.target();
        let mut sink = Box::new(target.open().await.unwrap());
        // QEMU may hang up while it is being written to, or after.
        if sink.apply(events).await.is_ok() {
            let _ = sink.finish().await;
        }
        let error = target.wait_loaded().await.unwrap_err();
        if qemu.version == "10.0" {
            assert!(told(&error).contains("Failed"), "{}", told(&error));
        } else {
            assert!(told(&error).contains("does not answer"), "{}", told(&error));
            assert!(guest.words().contains("load of migration failed"), "{}", guest.words());
        }
        target.run().await.unwrap_err();
    }
}

#[tokio::test]
async fn a_stream_that_is_cut_never_counts_as_ended() {
    for qemu in qemus() {
        let capture = capture(&qemu).await;
        let events = parse(&capture.stream, Parser::new());
        let guest = Guest::incoming(&qemu).await;
        let mut sink = Box::new(guest.target().open().await.unwrap());
        let (_, cut) = events.split_last().unwrap();
        sink.apply(cut.to_vec()).await.unwrap();
        let error = sink.finish().await.unwrap_err();
        assert!(told(&error).contains("was cut off"), "{}", told(&error));
        assert_ne!(guest.state().await, "running");
        guest.kill().await;
    }
}
