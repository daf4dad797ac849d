//! Rows of the comparison, as a table for people.

use std::fmt::Write;

use super::{Found, Row};

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A table of rows in their order; of equal ones (pair and tool) the last stands.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<12} {:<18} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9} {:>8} {:>9} {:>17} {:>17}\n",
        "pair",
        "tool",
        "missing",
        "frames",
        "zstd-3",
        "zstd-19",
        "ids flat",
        "ids",
        "entries",
        "index",
        "CPU s/GiB",
        "near 3/19",
        "anywhere 3/19"
    );
    for (at, row) in rows.iter().enumerate() {
        let is_superseded = |later: &Row| later.pair == row.pair && later.tool == row.tool;
        if !rows[at + 1..].iter().any(is_superseded) {
            line(&mut text, row);
        }
    }
    text
}

fn line(text: &mut String, row: &Row) {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / MIB);
    let gib = row.new_data_bytes as f64 / GIB;
    let _ = match &row.found {
        Found::Rival(coded) => writeln!(
            text,
            "{:<12} {:<18} {:>9} {:>9} {:>9} {:>56.2}",
            row.pair,
            row.tool,
            "",
            "",
            mib(coded.bytes),
            coded.cpu_s / gib
        ),
        Found::Scheme(figures) => {
            let at = |coded: &[(String, super::Coded)], level: &str| {
                let found = coded.iter().find(|(name, _)| name == level);
                found.map_or_else(|| "-".to_owned(), |(_, coded)| mib(coded.bytes))
            };
            let rest = |rest: &Option<super::Rest>| {
                rest.as_ref().map_or_else(String::new, |rest| {
                    let (fast, slow) = (at(&rest.coded, "zstd-3"), at(&rest.coded, "zstd-19"));
                    format!("{fast}/{slow}+{}", mib(rest.hash_bytes))
                })
            };
            writeln!(
                text,
                "{:<12} {:<18} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9} {:>8} {:>9.2} {:>17} {:>17}",
                row.pair,
                row.tool,
                mib(figures.missing_bytes),
                figures.in_frames.map_or_else(|| "-".to_owned(), |coded| mib(coded.bytes)),
                at(&figures.coded, "zstd-3"),
                at(&figures.coded, "zstd-19"),
                mib(figures.ids_flat_bytes),
                mib(figures.ids_bytes),
                figures.entries,
                mib(figures.index_bytes),
                figures.scan_cpu_s / gib,
                rest(&figures.near),
                rest(&figures.anywhere)
            )
        }
    };
}
