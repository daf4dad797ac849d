//! The report of a seed or migration, as people read it.
//!
//! Invariant: every number comes from the report; shares and sums are made here and nowhere else.

use super::table::Table;
use crate::migration::Completed;
use crate::migration::report::{Downtime, LinkReport, Saved};
use crate::units::{ByteCount, duration_text};

/// The whole report.
pub(super) fn render(report: &Completed) -> String {
    let total = duration_text(report.total_ms);
    let mut text = match (&report.image, &report.downtime) {
        (Some(image), _) => {
            format!("{} lies at {} as {image}: {total}\n", report.vm, report.peer)
        }
        (None, Some(downtime)) => format!(
            "{} runs at {}: {total}, downtime {}\n",
            report.vm,
            report.peer,
            ms_text(downtime.total_ms)
        ),
        (None, None) => format!("{} is seeded to {}: {total}\n", report.vm, report.peer),
    };
    text += "\n";
    text += &phases(report);
    if let Some(downtime) = &report.downtime {
        text += &format!("\n  downtime {} = {}\n", ms_text(downtime.total_ms), split(downtime));
        let hand_over = ms_text(downtime.hand_over_ms);
        text += &format!("  of it from the last byte sent to the guest running: {hand_over}\n");
    }
    text += &saved(&report.saved);
    text += &report.link.as_deref().map_or_else(String::new, link);
    for note in &report.notes {
        text += &format!("\n  note: {note}\n");
    }
    text
}

fn phases(report: &Completed) -> String {
    let bytes = |count| ByteCount(count).to_string();
    let mut table =
        Table::new(&["PHASE", ">ROUNDS", ">TIME", ">PAYLOAD", ">ON THE WIRE", ">SHARE"]);
    for (name, phase) in &report.phases {
        table.row([
            name.clone(),
            phase.rounds.to_string(),
            duration_text(phase.duration_ms),
            bytes(phase.payload_bytes),
            bytes(phase.wire_bytes),
            share(phase.wire_bytes, phase.payload_bytes),
        ]);
    }
    table.row([
        "total".to_owned(),
        String::new(),
        duration_text(report.total_ms),
        bytes(report.payload_bytes),
        bytes(report.wire_bytes),
        share(report.wire_bytes, report.payload_bytes),
    ]);
    table.render("  ")
}

/// What crossed the WAN, of what there was to move.
fn share(wire: u64, payload: u64) -> String {
    match payload {
        0 => "-".to_owned(),
        _ => format!("{:.1} %", wire as f64 * 100.0 / payload as f64),
    }
}

fn split(downtime: &Downtime) -> String {
    let parts = [
        ("collect", downtime.collect_ms),
        ("drain", downtime.drain_ms),
        ("park", downtime.park_ms),
        ("token", downtime.token_ms),
        ("check", downtime.check_ms),
        ("load", downtime.load_ms),
        ("journal", downtime.journal_ms),
        ("start", downtime.start_ms),
    ];
    parts.map(|(name, ms)| format!("{name} {ms:.1}")).join(" + ")
}

/// What did not have to cross the WAN, by what spared it; nothing if nothing was spared.
fn saved(saved: &Saved) -> String {
    let parts = [
        ("zero on disk", saved.disk_zero_bytes),
        ("known at the target", saved.disk_known_bytes),
        ("disk compression", saved.disk_compressed_bytes),
        ("zero in memory", saved.memory_zero_bytes),
        ("repeated pages", saved.memory_repeated_bytes),
        ("pages that lie on disk", saved.memory_on_disk_bytes),
        ("superseded pages", saved.memory_superseded_bytes),
        ("page differences", saved.memory_delta_bytes),
        ("memory compression", saved.memory_compressed_bytes),
    ];
    if parts.iter().all(|(_, bytes)| *bytes == 0) {
        return String::new();
    }
    let mut table = Table::new(&["NOT SENT", ">BYTES"]);
    for (name, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
        table.row([name.to_owned(), ByteCount(bytes).to_string()]);
    }
    format!("\n{}", table.render("  "))
}

/// How the link was.
fn link(link: &LinkReport) -> String {
    let rate = match link.bandwidth_bits_per_s {
        0 => String::new(),
        bits => format!("{:.1} Mbit/s, ", bits as f64 / 1e6),
    };
    let reconnects = match link.reconnects {
        0 => String::new(),
        1 => ", connected anew once".to_owned(),
        times => format!(", connected anew {times} times"),
    };
    let connections = match link.connections {
        0 | 1 => String::new(),
        count => format!(", over {count} connections"),
    };
    format!(
        "\n  link: {rate}round trip {} ({} at least), {} of what was sent was sent again{reconnects}\
         {connections}\n",
        ms_text(link.rtt_ms),
        ms_text(link.min_rtt_ms),
        share(link.repeated_bytes, link.wire_bytes_sent),
    )
}

fn ms_text(ms: f64) -> String {
    match ms {
        ..1000.0 => format!("{ms:.1} ms"),
        _ => duration_text(ms as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::report::PhaseReport;

    fn phase(
        name: &str,
        duration_ms: u64,
        rounds: u32,
        payload: u64,
        wire: u64,
    ) -> (String, PhaseReport) {
        let (payload_bytes, wire_bytes) = (payload, wire);
        (name.to_owned(), PhaseReport { duration_ms, rounds, payload_bytes, wire_bytes })
    }

    fn migration() -> Completed {
        Completed {
            vm: "db1".into(),
            peer: "lyon".into(),
            total_ms: 251_400,
            downtime: Some(Downtime {
                total_ms: 187.3,
                collect_ms: 12.0,
                drain_ms: 88.1,
                park_ms: 9.2,
                token_ms: 40.0,
                check_ms: 10.0,
                load_ms: 15.0,
                journal_ms: 5.0,
                start_ms: 8.0,
                hand_over_ms: 78.0,
            }),
            phases: vec![
                phase("sync", 31_000, 2, 512 << 20, 21 << 20),
                phase("pre-copy", 218_000, 5, 4 << 30, 700 << 20),
                phase("switchover", 240, 1, 9 << 20, 2 << 20),
            ],
            saved: Saved {
                disk_known_bytes: 480 << 20,
                memory_zero_bytes: 2 << 30,
                memory_superseded_bytes: 300 << 20,
                ..Saved::default()
            },
            wire_bytes: 723 << 20,
            payload_bytes: (4 << 30) + (521 << 20),
            notes: vec!["the guest was slowed down to 80 % for 12 s".into()],
            link: Some(Box::new(LinkReport {
                wire_bytes_sent: 700 << 20,
                repeated_bytes: 7 << 20,
                rtt_ms: 82.4,
                min_rtt_ms: 80.1,
                bandwidth_bits_per_s: 195_000_000,
                reconnects: 1,
                ..LinkReport::default()
            })),
            image: None,
        }
    }

    #[test]
    fn a_migration_reads_like_this() {
        let expected = "\
db1 runs at lyon: 4 min 11 s, downtime 187.3 ms

  PHASE       ROUNDS        TIME    PAYLOAD  ON THE WIRE   SHARE
  sync             2      31.0 s  512.0 MiB     21.0 MiB   4.1 %
  pre-copy         5  3 min 38 s    4.0 GiB    700.0 MiB  17.1 %
  switchover       1      240 ms    9.0 MiB      2.0 MiB  22.2 %
  total               4 min 11 s    4.5 GiB    723.0 MiB  15.7 %

  downtime 187.3 ms = collect 12.0 + drain 88.1 + park 9.2 + token 40.0 + check 10.0 + load 15.0 + journal 5.0 + start 8.0
  of it from the last byte sent to the guest running: 78.0 ms

  NOT SENT                 BYTES
  known at the target  480.0 MiB
  zero in memory         2.0 GiB
  superseded pages     300.0 MiB

  link: 195.0 Mbit/s, round trip 82.4 ms (80.1 ms at least), 1.0 % of what was sent was sent again, connected anew once

  note: the guest was slowed down to 80 % for 12 s
";
        assert_eq!(render(&migration()), expected);
    }

    #[test]
    fn a_seed_has_no_downtime() {
        let seed = Completed {
            vm: "db1".into(),
            peer: "lyon".into(),
            total_ms: 4200,
            phases: vec![phase("seed", 4200, 1, 0, 900)],
            wire_bytes: 900,
            ..Completed::default()
        };
        let expected = "\
db1 is seeded to lyon: 4.2 s

  PHASE  ROUNDS   TIME  PAYLOAD  ON THE WIRE  SHARE
  seed        1  4.2 s      0 B        900 B      -
  total          4.2 s      0 B        900 B      -
";
        assert_eq!(render(&seed), expected);
    }
}
