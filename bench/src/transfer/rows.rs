//! Rows of transfers: one JSON object a line, for one flow alone or several at once.
//!
//! Invariant: a row names its sources, its link, its seed and its host, and no path of a machine.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::caps::Kept;
use super::{Bound, Engine, Tool, rsync};
use crate::guest;
use crate::profile::Profile;
use crate::relay::Stats;
use crate::row::Made;

/// One measurement, as a line of a result file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measurement", rename_all = "snake_case")]
pub enum Row {
    /// One flow alone.
    Link(Box<LinkRow>),
    /// Several flows at once.
    Share(Box<ShareRow>),
}

/// Where a row comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// The WAN.
    pub profile: Profile,
    /// Decides the WAN's losses.
    pub seed: u64,
    /// Number of the run, from 1.
    pub run: u32,
}

/// What one flow made of a link of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkRow {
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: Origin,
    /// The tool's name.
    pub tool: String,
    /// Its version in its own words; of the kernel's TCP the host's kernel says it.
    pub tool_version: String,
    /// What was asked for.
    pub bound: Bound,
    /// Why nothing can be said of it; empty if something can.
    #[serde(default)]
    pub failed: String,
    /// The figures.
    #[serde(flatten)]
    pub figures: Figures,
    /// How its caps were kept, if it had any; it is no measure of the link then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caps: Vec<Kept>,
    /// The relay's counters over the whole of it.
    pub wire: Stats,
}

/// What was worked out of one flow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// From the first byte offered (the connection was made before, except by rsync) to the last one
    /// received; the time that was given, where a time was.
    pub seconds: f64,
    /// Payload that arrived in these seconds.
    pub payload_bytes: u64,
    /// Payload that arrived in all: what was offered in time is brought to its end.
    pub total_bytes: u64,
    /// Payload a second.
    pub mbit_per_s: f64,
    /// Over what the link carries of it, its headers taken off: 1 is all of the link.
    pub goodput: f64,
    /// Bytes that need not have been sent over those that had to be, both directions.
    pub waste: f64,
    /// Until what arrived over a round trip was 90 % of the link; absent if that never was.
    pub start_round_trips: Option<f64>,
    /// How long packets waited before the bottleneck, in milliseconds.
    pub queue_ms_median: f64,
    /// The same: 95 of 100 waited less.
    pub queue_ms_p95: f64,
    /// Packets whose content was sent again, as the sender counts them, where it does.
    pub repeated_packets: Option<u64>,
    /// CPU.
    pub cpu_s_per_gib: Cpu,
    /// IP Mbit/s at the receiver, each half second from the first byte offered on.
    pub rates_mbit: Vec<f64>,
}

/// CPU seconds for each GiB of payload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// The sender's process.
    pub sender: f64,
    /// The receiver's process.
    pub receiver: f64,
    /// The relay's process. Part of what the kernel's TCP does at both ends is done in its name.
    pub relay: f64,
}

/// What several flows made of one link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShareRow {
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: Origin,
    /// The figures.
    #[serde(flatten)]
    pub figures: ShareFigures,
    /// The relay's counters over the whole of it.
    pub wire: Stats,
}

/// What was worked out of several flows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShareFigures {
    /// The flows in the order in which they began.
    pub flows: Vec<ShareFlow>,
    /// When all of them ran and were warm: seconds since the first one began, from and to.
    pub window_s: [f64; 2],
    /// IP bytes of all flows in that time over what the link carries.
    pub used: f64,
    /// Jain's index of the shares: 1 is fair, 1/n is one flow with everything.
    pub jain: f64,
    /// Seconds from the end of the flows that ended early until the others took 95 % of the link over
    /// half a second, that half second included; absent if none ended early, or if that never was.
    pub recovery_s: Option<f64>,
    /// How long packets waited before the bottleneck, in milliseconds.
    pub queue_ms_median: f64,
    /// The same: 95 of 100 waited less.
    pub queue_ms_p95: f64,
}

/// One of the flows that share a link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShareFlow {
    /// The tool's name.
    pub tool: String,
    /// Its version in its own words.
    pub tool_version: String,
    /// When it began and when it ended, in seconds since the first one began.
    pub ran_s: [f64; 2],
    /// Its part of the IP bytes that all flows got in the window.
    pub share: f64,
    /// IP Mbit/s in the window.
    pub mbit_per_s: f64,
    /// IP Mbit/s at its receiver, each half second since the first flow began.
    pub rates_mbit: Vec<f64>,
}

/// What a tool says of its version.
pub(super) fn version(tool: Tool) -> Result<String> {
    match tool.engine() {
        Engine::Longhaul => Ok(env!("CARGO_PKG_VERSION").to_owned()),
        Engine::Quinn(_) => locked("quinn"),
        Engine::Tcp { .. } => Ok(String::new()),
        Engine::Rsync => rsync::version(),
    }
}

/// The version of a crate of which the sources' lock file has one.
fn locked(name: &str) -> Result<String> {
    let path = guest::bench_folder().join("../Cargo.lock");
    let text = std::fs::read_to_string(path).context("while reading Cargo.lock")?;
    let lock: toml::Table = toml::from_str(&text).context("while reading Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array);
    let package = packages
        .into_iter()
        .flatten()
        .find(|package| package.get("name").and_then(toml::Value::as_str) == Some(name));
    let version = package.and_then(|package| package.get("version")?.as_str());
    version.map(str::to_owned).with_context(|| format!("Cargo.lock has no {name}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::row;

    fn origin() -> Origin {
        Origin {
            made: row::tests::made("lab link run"),
            profile: Profile::named("metro").unwrap(),
            seed: 1,
            run: 1,
        }
    }

    pub(in crate::transfer) fn link(tool: Tool, goodput: f64, failed: &str) -> Row {
        Row::Link(Box::new(LinkRow {
            caps: Vec::new(),
            origin: origin(),
            tool: tool.name(),
            tool_version: String::new(),
            bound: Bound::Bytes(1 << 20),
            failed: failed.to_owned(),
            figures: Figures { goodput, ..Figures::default() },
            wire: Stats::default(),
        }))
    }

    pub(in crate::transfer) fn share(shares: [f64; 2], recovery_s: Option<f64>) -> Row {
        let flow = |share| ShareFlow {
            tool: "longhaul".to_owned(),
            tool_version: String::new(),
            ran_s: [0.0, 10.0],
            share,
            mbit_per_s: 100.0,
            rates_mbit: vec![100.0],
        };
        Row::Share(Box::new(ShareRow {
            origin: origin(),
            figures: ShareFigures {
                flows: shares.map(flow).into(),
                window_s: [5.0, 10.0],
                used: 1.0,
                jain: 1.0,
                recovery_s,
                queue_ms_median: 1.0,
                queue_ms_p95: 2.0,
            },
            wire: Stats::default(),
        }))
    }

    #[test]
    fn rows_survive_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let rows = [link(Tool::TcpBbr8, 0.5, ""), share([0.4, 0.6], Some(2.0))];
        for row in &rows {
            row::append(&path, row).unwrap();
        }
        assert_eq!(row::read::<Row>(&path).unwrap(), rows);
    }

    #[test]
    fn a_tool_has_a_name_and_a_version() {
        assert_eq!(Tool::TcpCubic8.name(), "tcp-cubic-8");
        let json = serde_json::to_string(&Tool::TcpCubic8).unwrap();
        assert_eq!(json, "\"tcp-cubic-8\"");
        assert!(version(Tool::QuinnBbr).unwrap().starts_with("0."));
    }
}
