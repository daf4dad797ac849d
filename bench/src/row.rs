//! Result rows: one JSON object a line, with everything that is needed to repeat the number.
//!
//! Invariant: a row without revision, seed, profile and machine cannot be made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guest::{self, Machine};
use crate::profile::Profile;
use crate::relay::Stats;
use crate::watch::Verdict;

/// Longest line of a result file.
const LINE_BYTES_MAX: usize = 1 << 20;

/// One run of one tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// `longhaul` or a rival.
    pub tool: String,
    /// Which way of using the tool: empty for its default.
    #[serde(default)]
    pub variant: String,
    /// The tool's version in its own words.
    #[serde(default)]
    pub tool_version: String,
    /// The WAN.
    pub profile: Profile,
    /// TCP's congestion control in the lab; tools that use UDP bring their own.
    pub tcp_congestion_control: String,
    /// Decides the WAN's losses.
    pub seed: u64,
    /// Number of the run, from 1.
    pub run: u32,
    /// The guest's machine.
    pub guest: Machine,
    /// Seconds of each phase, in the tool's own words.
    pub phases_s: BTreeMap<String, f64>,
    /// From the command to the guest running at the target, in seconds.
    pub total_s: f64,
    /// From the last instruction at the source to the first at the target, by the tool's own
    /// account; [`Verdict::gap_ms`] is the same from outside.
    pub downtime_ms: f64,
    /// IP bytes on the WAN in both directions.
    pub wire_bytes: u64,
    /// The WAN's counters over the run.
    pub wire: Stats,
    /// Bytes that the source's image occupies.
    pub source_image_bytes: u64,
    /// Bytes that the target's image occupies.
    pub target_image_bytes: u64,
    /// What the guest said afterwards.
    pub verdict: Verdict,
    /// What the tool itself reported.
    #[serde(default)]
    pub report: Value,
}

/// What every row says of its making, whatever it measures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// When it ended, UTC.
    pub time: String,
    /// The command line that made it; of paths only the last part.
    pub command: String,
    /// What the sources were.
    pub revision: Revision,
    /// Where it ran.
    pub host: Host,
}

impl Made {
    /// Of a measurement of the sources of `revision` that ends now, by this process.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub(crate) fn now(revision: &Revision) -> Result<Self> {
        Ok(Self {
            time: jiff::Timestamp::now().to_string(),
            command: shown(std::env::args().skip(1)),
            revision: revision.clone(),
            host: Host::current()?,
        })
    }
}

/// A command line of this program: of every path only the last part.
fn shown(arguments: impl Iterator<Item = String>) -> String {
    let shown = arguments.map(|argument| {
        let (key, value) =
            argument.split_once('=').map_or((None, &*argument), |(key, value)| (Some(key), value));
        let last = Path::new(value).file_name().and_then(std::ffi::OsStr::to_str);
        let value = last.filter(|_| Path::new(value).is_absolute()).unwrap_or(value);
        key.map_or_else(|| value.to_owned(), |key| format!("{key}={value}"))
    });
    std::iter::once("lab".to_owned()).chain(shown).collect::<Vec<_>>().join(" ")
}

/// Which sources a row was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// git's abbreviated hash.
    pub commit: String,
    /// Whether files differed from it.
    pub is_dirty: bool,
}

/// Where a row was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The processor's name.
    pub cpu: String,
    /// How many the system has.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
}

impl Revision {
    /// The revision of the sources that this program was built from.
    ///
    /// # Errors
    ///
    /// When they are in no git repository: then no row can be made.
    pub fn current() -> Result<Self> {
        let git = |arguments: &[&str]| -> Result<String> {
            let output = Command::new("git")
                .arg("-C")
                .arg(guest::bench_folder())
                .args(arguments)
                .output()
                .context("while running git")?;
            anyhow::ensure!(
                output.status.success(),
                "git {} failed: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        Ok(Self {
            commit: git(&["rev-parse", "--short=12", "HEAD"])?,
            is_dirty: !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty(),
        })
    }
}

impl Host {
    /// This host.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub fn current() -> Result<Self> {
        Ok(Self {
            cpu: proc_field("/proc/cpuinfo", "model name")?,
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: meminfo_bytes("MemTotal")? >> 20,
            kernel: proc_text("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        })
    }

    /// Memory that can be had now without pushing anything out.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub fn available_bytes() -> Result<u64> {
        meminfo_bytes("MemAvailable")
    }
}

fn proc_text(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("while reading {path}"))
}

/// What follows `key:` in a file of lines like that; empty if it is not there.
fn proc_field(path: &str, key: &str) -> Result<String> {
    let text = proc_text(path)?;
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim());
    Ok(value.unwrap_or_default().to_owned())
}

fn meminfo_bytes(key: &str) -> Result<u64> {
    let value = proc_field("/proc/meminfo", key)?;
    Ok(value.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10)
}

/// Appends a row to a result file.
///
/// # Errors
///
/// When it cannot be written.
pub fn append(path: &Path, row: &impl Serialize) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("while opening {}", path.display()))?;
    let mut line = serde_json::to_vec(row)?;
    line.push(b'\n');
    file.write_all(&line).with_context(|| format!("while writing to {}", path.display()))
}

/// Reads a result file.
///
/// # Errors
///
/// Names the line that is no row.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = File::open(path).with_context(|| format!("while opening {}", path.display()))?;
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(BufReader::new(file).lines()) {
        let line = line?;
        anyhow::ensure!(line.len() <= LINE_BYTES_MAX, "{}:{number}: too long", path.display());
        if !line.trim().is_empty() {
            let row = serde_json::from_str(&line)
                .with_context(|| format!("{}:{number} is no row", path.display()))?;
            rows.push(row);
        }
    }
    Ok(rows)
}

/// What `lab compare` prints of the rows of one profile, guest, tool and variant.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The WAN's name.
    pub profile: String,
    /// The guest's name.
    pub guest: String,
    /// The tool, with its variant.
    pub tool: String,
    /// How many rows.
    pub runs: usize,
    /// How many of them had a guest that was well.
    pub survived: usize,
    /// Median of [`Row::total_s`].
    pub total_s: f64,
    /// Median of [`Row::downtime_ms`].
    pub downtime_ms: f64,
    /// Median of [`Verdict::gap_ms`].
    pub gap_ms: f64,
    /// Median of [`Row::wire_bytes`], in MiB.
    pub wire_mib: f64,
    /// Median of what the tool reports of its hand-over: from the last byte of data sent to the guest
    /// running; 0 for a tool that does not say.
    pub hand_over_ms: f64,
    /// Median of the target hypervisor's own part of it, its load of the device state.
    pub device_load_ms: f64,
}

/// Summarises rows: medians of each profile, guest, tool and variant, in this order.
pub fn summarise(rows: &[Row]) -> Vec<Summary> {
    let mut groups: BTreeMap<(String, String, String), Vec<&Row>> = BTreeMap::new();
    for row in rows {
        let guest = format!("{:?}", row.guest.guest).to_lowercase();
        let separator = if row.variant.is_empty() { "" } else { " " };
        let tool = format!("{}{separator}{}", row.tool, row.variant);
        groups.entry((row.profile.name.clone(), guest, tool)).or_default().push(row);
    }
    let summary = |((profile, guest, tool), rows): ((String, String, String), Vec<&Row>)| Summary {
        profile,
        guest,
        tool,
        runs: rows.len(),
        survived: rows.iter().filter(|row| row.verdict.ok).count(),
        total_s: median(rows.iter().map(|row| row.total_s)),
        downtime_ms: median(rows.iter().map(|row| row.downtime_ms)),
        gap_ms: median(rows.iter().filter_map(|row| row.verdict.gap_ms)),
        wire_mib: median(rows.iter().map(|row| row.wire_bytes as f64 / f64::from(1 << 20))),
        hand_over_ms: median(reported(&rows, "hand_over_ms")),
        device_load_ms: median(reported(&rows, "load_ms")),
    };
    groups.into_iter().map(summary).collect()
}

/// Parts of the downtime as the tool reported them.
fn reported<'a>(rows: &'a [&Row], part: &'a str) -> impl Iterator<Item = f64> + 'a {
    rows.iter().filter_map(move |row| row.report["downtime"][part].as_f64())
}

/// A table for people: medians, and how many times each is of Longhaul's of the same profile and
/// guest, where there is one.
pub fn table(summaries: &[Summary]) -> String {
    let mut text = format!(
        "{:<18} {:<7} {:<28} {:>4} {:>4} {:>17} {:>17} {:>17} {:>17}\n",
        "profile", "guest", "tool", "runs", "well", "total s", "downtime ms", "gap ms", "wire MiB"
    );
    for summary in summaries {
        let base = summaries.iter().find(|other| {
            other.tool == "longhaul"
                && other.profile == summary.profile
                && other.guest == summary.guest
        });
        let cell = |value: f64, of: fn(&Summary) -> f64| match base {
            // A move that was given up has no downtime.
            _ if value == 0.0 => "-".to_owned(),
            Some(base) if of(base) > 0.0 => format!("{value:.1} ({:.2}x)", value / of(base)),
            _ => format!("{value:.1}"),
        };
        text += &format!(
            "{:<18} {:<7} {:<28} {:>4} {:>4} {:>17} {:>17} {:>17} {:>17}\n",
            summary.profile,
            summary.guest,
            summary.tool,
            summary.runs,
            summary.survived,
            cell(summary.total_s, |s| s.total_s),
            cell(summary.downtime_ms, |s| s.downtime_ms),
            cell(summary.gap_ms, |s| s.gap_ms),
            cell(summary.wire_mib, |s| s.wire_mib),
        );
    }
    for Summary { profile, guest, tool, hand_over_ms, device_load_ms, .. } in summaries {
        if *hand_over_ms > 0.0 {
            text += &format!(
                "{tool}, {guest} over {profile}: hand-over {hand_over_ms:.1} ms from the last byte \
                 sent to the guest running, of which the hypervisor's load {device_load_ms:.1} ms\n"
            );
        }
    }
    text
}

/// The median; 0 of nothing.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::guest::{Format, Kind};

    pub(crate) fn made(command: &str) -> Made {
        Made {
            time: "2026-01-01T00:00:00Z".to_owned(),
            command: command.to_owned(),
            revision: Revision { commit: "0123456789ab".to_owned(), is_dirty: false },
            host: Host {
                cpu: "some".to_owned(),
                cores: 2,
                memory_mib: 1024,
                kernel: "6.1".to_owned(),
            },
        }
    }

    fn row(tool: &str, total_s: f64, wire_bytes: u64, ok: bool) -> Row {
        Row {
            made: made("lab run"),
            tool: tool.to_owned(),
            variant: String::new(),
            tool_version: String::new(),
            profile: Profile::named("metro").unwrap(),
            tcp_congestion_control: "bbr".to_owned(),
            seed: 1,
            run: 1,
            guest: Machine {
                guest: Kind::Tiny,
                memory_mib: 256,
                cpus: 1,
                format: Format::Raw,
                append: String::new(),
                accel: "tcg".to_owned(),
            },
            phases_s: BTreeMap::new(),
            total_s,
            downtime_ms: 100.0,
            wire_bytes,
            wire: Stats::default(),
            source_image_bytes: 0,
            target_image_bytes: 0,
            verdict: Verdict { ok, ..Verdict::default() },
            report: Value::Null,
        }
    }

    #[test]
    fn rows_survive_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results/one.jsonl");
        let rows = [row("qemu", 10.0, 1 << 20, true), row("longhaul", 5.0, 1 << 19, true)];
        for row in &rows {
            append(&path, row).unwrap();
        }
        assert_eq!(read::<Row>(&path).unwrap(), rows);
        std::fs::write(&path, "{}\n").unwrap();
        assert!(format!("{:#}", read::<Row>(&path).unwrap_err()).contains("one.jsonl:1"));
    }

    #[test]
    fn medians_and_ratios_are_those_of_the_group() {
        let rows = [
            row("qemu", 30.0, 8 << 20, true),
            row("qemu", 10.0, 2 << 20, false),
            row("qemu", 20.0, 4 << 20, true),
            row("longhaul", 4.0, 1 << 20, true),
            row("longhaul", 6.0, 1 << 20, true),
        ];
        let summaries = summarise(&rows);
        let [longhaul, qemu] = summaries.as_slice() else { panic!("{summaries:?}") };
        assert_eq!((longhaul.total_s, longhaul.wire_mib), (5.0, 1.0));
        assert_eq!((qemu.total_s, qemu.wire_mib, qemu.runs, qemu.survived), (20.0, 4.0, 3, 2));
        let text = table(&summaries);
        assert!(text.contains("20.0 (4.00x)") && text.contains("5.0 (1.00x)"), "{text}");
    }

    #[test]
    fn this_host_and_these_sources_have_names() {
        assert!(Host::current().unwrap().memory_mib > 0);
        assert_eq!(Revision::current().unwrap().commit.len(), 12);
    }

    #[test]
    fn a_command_shows_no_folders() {
        let command = ["link", "run", "--results", "/home/me/link.jsonl", "--a=/b/c", "--x=y/z"];
        let shown = shown(command.iter().map(|&argument| argument.to_owned()));
        assert_eq!(shown, "lab link run --results link.jsonl --a=c --x=y/z");
    }
}
