//! Transfers through a real WAN by the lab's command line: that bytes arrive, rows are whole and
//! nothing stays. How fast it is is for a measurement to say, not for a test.
//!
//! Needs root, /dev/net/tun and iproute2; without them every test here says that it was skipped.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in what its cases share")]

use std::process::Command;

use longhaul_bench::netns;
use longhaul_bench::row;
use longhaul_bench::transfer::Bound;
use longhaul_bench::transfer::rows::Row;
use longhaul_bench::wan;

const MIB: u64 = 1 << 20;

/// Runs `lab link` over a link of 100 Mbit/s and 10 ms that loses some packets; gives its rows.
fn measure(what: &str, arguments: &[&str]) -> Vec<Row> {
    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("rows.jsonl");
    let child = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["link", what, "--profile", "metro", "--rate", "100mbit", "--rtt", "10ms"])
        .args(["--loss", "0.1%", "--results"])
        .arg(&results)
        .args(arguments)
        .spawn()
        .unwrap();
    let pid = child.id();
    assert!(child.wait_with_output().unwrap().status.success());
    assert!(!wan::folder(&format!("link-{pid}")).exists(), "the WAN stayed");
    row::read(&results).unwrap()
}

#[test]
fn every_tool_brings_its_payload_and_makes_a_row() {
    if netns::is_skipped("every_tool_brings_its_payload_and_makes_a_row") {
        return;
    }
    let tools = [
        "longhaul",
        "quinn-cubic",
        "quinn-bbr",
        "tcp-bbr",
        "tcp-cubic",
        "tcp-bbr-8",
        "tcp-cubic-8",
        "rsync",
    ];
    let rows = measure("run", &["--mib", "4", "--seed", "7", "--tools", &tools.join(",")]);
    let mut measured = Vec::new();
    for row in &rows {
        let Row::Link(row) = row else { panic!("{row:?}") };
        let figures = &row.figures;
        assert_eq!(row.failed, "", "{}", row.tool);
        assert_eq!((row.bound, row.origin.seed, row.origin.run), (Bound::Bytes(4 * MIB), 7, 1));
        assert_eq!((figures.payload_bytes, figures.total_bytes), (4 * MIB, 4 * MIB));
        assert_eq!(row.origin.profile.name, "metro*");
        assert!(row.wire.a_to_b.sent_bytes > 4 * MIB, "{}", row.tool);
        assert!(figures.seconds > 0.0 && figures.goodput > 0.0, "{}: {figures:?}", row.tool);
        assert!(figures.goodput <= 1.05 && figures.waste >= 0.0, "{}: {figures:?}", row.tool);
        assert!(figures.cpu_s_per_gib.sender > 0.0, "{}: {figures:?}", row.tool);
        measured.push(row.tool.as_str());
    }
    // Where there is no rsync, there is no row of it.
    let there: Vec<_> = tools.iter().filter(|tool| measured.contains(tool)).collect();
    assert_eq!(there.len(), measured.len());
    assert!(measured.len() >= tools.len() - 1, "{measured:?}");
}

#[test]
fn a_transfer_ends_when_its_time_does() {
    if netns::is_skipped("a_transfer_ends_when_its_time_does") {
        return;
    }
    let rows = measure("run", &["--seconds", "1", "--tools", "longhaul,tcp-cubic,quinn-cubic"]);
    assert_eq!(rows.len(), 3);
    for row in &rows {
        let Row::Link(row) = row else { panic!("{row:?}") };
        let figures = &row.figures;
        assert_eq!((row.failed.as_str(), figures.seconds), ("", 1.0), "{}", row.tool);
        assert!(figures.payload_bytes > 0, "{}: {figures:?}", row.tool);
        assert!(figures.payload_bytes <= figures.total_bytes, "{}: {figures:?}", row.tool);
        assert_eq!(figures.rates_mbit.len(), 2);
    }
}

#[test]
fn flows_share_a_link() {
    if netns::is_skipped("flows_share_a_link") {
        return;
    }
    let arguments = ["--flows", "longhaul,tcp-cubic", "--seconds", "4", "--stagger", "0.5"];
    let rows =
        measure("share", &[&arguments[..], &["--warm-up", "1", "--stop-after", "2=3"]].concat());
    let [Row::Share(row)] = rows.as_slice() else { panic!("{rows:?}") };
    let figures = &row.figures;
    let tools: Vec<_> = figures.flows.iter().map(|flow| flow.tool.as_str()).collect();
    assert_eq!((tools.as_slice(), figures.window_s), (&["longhaul", "tcp-cubic"][..], [1.5, 3.0]));
    let sum: f64 = figures.flows.iter().map(|flow| flow.share).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{figures:?}");
    assert!(figures.flows.iter().all(|flow| flow.share > 0.0), "{figures:?}");
    assert!((0.5..=1.0).contains(&figures.jain) && figures.used > 0.0, "{figures:?}");
}
