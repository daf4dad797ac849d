//! One flow at a time: every tool in turn over a fresh WAN, run after run.
//!
//! Invariant: in one run all tools have the same seed; a tool that fails makes a row that says so,
//! and the others go on.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::account::{self, Bytes, Carrier};
use super::caps::{Caps, Kept};
use super::flow::{self, Asked, Flow};
use super::meter::now_us;
use super::rows::{self, Cpu, Figures, LinkRow, Origin, Row};
use super::{Bound, Engine, Received, Sent, Tool, summary};
use crate::interrupt;
use crate::profile::Profile;
use crate::relay::Stats;
use crate::row::{self, Made, Revision};
use crate::slow::Slow;
use crate::wan::{self, Spec, Wan};

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Plan {
    /// The tools, in the order in which each run has them.
    #[arg(long, value_enum, value_delimiter = ',', required = true)]
    pub tools: Vec<Tool>,
    /// MiB of payload of each transfer.
    #[arg(long, required_unless_present = "seconds")]
    pub mib: Option<u64>,
    /// Instead: seconds for which payload is offered. For tools that would take minutes.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Caps on the tools `longhaul*`, changed while they send: SECOND=RATE, e.g. 0=20M,10=5M. How they
    /// were kept stands in the row.
    #[arg(long, value_name = "SECOND=RATE,..", requires = "seconds")]
    pub caps: Option<Caps>,
    /// Percent of a core that each thread which carries connections may take in the tools `longhaul*`, so
    /// that a core is the limit. Needs control groups of version 1. The transport does not take that for a
    /// limit by itself: to the kernel such a thread waits for a core.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(5..=100))]
    pub core_percent: Option<u32>,
    /// How many runs; the n-th one has the WAN's seed plus n - 1.
    #[arg(long, default_value_t = 1)]
    pub runs: u32,
    /// Decides the WAN's losses in the first run.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seconds after which a transfer is ended as it is.
    #[arg(long, default_value_t = 300)]
    pub give_up_s: u64,
    /// Where rows are appended.
    #[arg(long)]
    pub results: PathBuf,
}

impl Plan {
    fn bound(&self) -> Bound {
        match (self.seconds, self.mib) {
            (Some(seconds), _) => Bound::Seconds(seconds),
            (None, mib) => Bound::Bytes(mib.unwrap_or(1) << 20),
        }
    }
}

/// A WAN for each process that measures.
fn wan_name() -> String {
    format!("link-{}", std::process::id())
}

/// Takes that WAN down when a signal comes: with it everything in its namespaces ends.
pub(super) fn take_down_on_signal() -> Result<()> {
    interrupt::notice(|| {
        let _ = wan::down(&wan_name());
    })
}

/// The tools of these that can run here, each once named with why it cannot.
pub(super) fn possible(tools: &[Tool]) -> Vec<Tool> {
    let mut possible = tools.to_vec();
    possible.retain(|tool| match rows::version(*tool) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("lab: {} is left out: {error:#}", tool.name());
            false
        }
    });
    possible
}

/// Does all runs of a plan over the WAN `profile`, appends a row for each and prints a table.
///
/// # Errors
///
/// When there can be no WAN or no row. A tool that fails is no error.
pub fn run(plan: &Plan, profile: &Profile) -> Result<()> {
    let tools = possible(&plan.tools);
    ensure!(!tools.is_empty(), "there is no tool to measure");
    let revision = Revision::current()?;
    take_down_on_signal()?;
    let _slow = plan.core_percent.map(Slow::down).transpose()?;
    let mut rows = Vec::new();
    for run in 1..=plan.runs {
        for &tool in &tools {
            let row = interrupt::or_came(one(plan, profile, &revision, run, tool))
                .with_context(|| format!("in run {run} of {}", tool.name()))?;
            eprintln!("run {run}: {}", said(&row));
            let row = Row::Link(Box::new(row));
            row::append(&plan.results, &row)?;
            rows.push(row);
        }
    }
    print!("{}", summary::table(&summary::summarise(&rows)));
    Ok(())
}

fn said(row: &LinkRow) -> String {
    let (tool, figures) = (&row.tool, &row.figures);
    if !row.failed.is_empty() {
        return format!("{tool} FAILED: {}", row.failed);
    }
    if !row.caps.is_empty() {
        let kept = |kept: &Kept| {
            let (rate, most, used) = (kept.cap.rate, kept.most * 100.0, kept.used * 100.0);
            format!("{rate}: {most:.1} % in a second at most, {used:.1} % used")
        };
        return format!("{tool}: {}", row.caps.iter().map(kept).collect::<Vec<_>>().join("; "));
    }
    format!(
        "{tool}: {:.1} Mbit/s for {:.1} s, {:.1} % of the link, waste {:.2} %",
        figures.mbit_per_s,
        figures.seconds,
        figures.goodput * 100.0,
        figures.waste * 100.0
    )
}

fn one(
    plan: &Plan,
    profile: &Profile,
    revision: &Revision,
    run: u32,
    tool: Tool,
) -> Result<LinkRow> {
    let seed = plan.seed + u64::from(run - 1);
    let bound = plan.bound();
    let is_ours = tool.engine() == Engine::Longhaul;
    let caps = plan.caps.clone().filter(|_| is_ours).unwrap_or_default();
    let give_up = Duration::from_secs(plan.give_up_s);
    let asked = Asked { tool, bound, is_drained: true, caps, give_up };
    let scratch = tempfile::tempdir()?;
    let order = flow::prepare(scratch.path().join("flow"), &asked, profile)?;
    interrupt::check()?;
    let (wan, up_us) = bring_up(profile, seed)?;
    let begun = Instant::now();
    let done = Flow::listen(&wan, order, asked.give_up).and_then(|flow| flow.transfer(&wan));
    let wire = wan.stats()?;
    let mut kept = Vec::new();
    let (figures, mut failed) = match done {
        Ok((sent, received)) => {
            let carrier = Carrier { profile, up_us };
            let figures = figures(carrier, tool, bound, &sent, &received, &wire);
            kept = asked.caps.kept(&received.samples, sent.began_us, sent.ended_us);
            (figures, why_incomplete(bound, &received))
        }
        Err(error) => (Figures::default(), format!("{error:#}")),
    };
    interrupt::check()?;
    if !failed.is_empty() && begun.elapsed() >= asked.give_up {
        failed = format!("given up after {} s: {failed}", plan.give_up_s);
    }
    Ok(LinkRow {
        origin: origin(revision, profile, seed, run)?,
        tool: if asked.caps.is_empty() { tool.name() } else { format!("{}-capped", tool.name()) },
        tool_version: rows::version(tool)?,
        bound,
        failed,
        figures,
        caps: kept,
        wire,
    })
}

/// A WAN, and the moment of the monotonic clock at which its link's time began.
pub(super) fn bring_up(profile: &Profile, seed: u64) -> Result<(Wan, u64)> {
    let spec = Spec { name: wan_name(), profile: profile.clone(), seed, stats_file: None };
    let wan = Wan::up(&wan::lab_binary()?, spec)?;
    let stats = wan.stats()?;
    let up_us = now_us().saturating_sub((stats.elapsed_s * 1e6) as u64);
    Ok((wan, up_us))
}

pub(super) fn origin(
    revision: &Revision,
    profile: &Profile,
    seed: u64,
    run: u32,
) -> Result<Origin> {
    Ok(Origin { made: Made::now(revision)?, profile: profile.clone(), seed, run })
}

/// Why a transfer that came to an end is none; empty if it is one.
fn why_incomplete(bound: Bound, received: &Received) -> String {
    match bound {
        Bound::Bytes(bytes) if received.payload_bytes != bytes => {
            format!("{} of {bytes} bytes arrived", received.payload_bytes)
        }
        _ if received.payload_bytes == 0 => "nothing arrived".to_owned(),
        _ => String::new(),
    }
}

fn figures(
    carrier: Carrier<'_>,
    tool: Tool,
    bound: Bound,
    sent: &Sent,
    received: &Received,
    wire: &Stats,
) -> Figures {
    let bytes = Bytes::new(wire, received.payload_bytes, sent.repeated_packets);
    let total = received.payload_bytes as f64;
    let (end_us, payload) = match bound {
        Bound::Bytes(_) => (received.last_us, total),
        Bound::Seconds(seconds) => {
            let end_us = sent.began_us + (seconds * 1e6) as u64;
            let flow = |at| account::bytes_at(&received.samples, account::of_flow, at);
            // Of all that ever came, the part that came in time.
            (end_us, total * flow(end_us) / flow(u64::MAX).max(1.0))
        }
    };
    let seconds = end_us.saturating_sub(sent.began_us) as f64 / 1e6;
    let first = if total > 0.0 { payload * bytes.first / total } else { 0.0 };
    let a_second = |value: f64| if seconds > 0.0 { value / seconds } else { 0.0 };
    let a_gib = |cpu_s: f64| if total > 0.0 { cpu_s / (total / f64::from(1 << 30)) } else { 0.0 };
    // A file that is sent by a program of its own has no moment at which its first byte is offered.
    let has_start = tool.engine() != Engine::Rsync;
    Figures {
        seconds,
        payload_bytes: payload.round() as u64,
        total_bytes: received.payload_bytes,
        mbit_per_s: a_second(payload * 8e-6),
        goodput: first / carrier.bytes(sent.began_us, end_us).max(1.0),
        waste: bytes.waste(),
        start_round_trips: carrier
            .start_round_trips(&received.samples, sent.began_us)
            .filter(|_| has_start),
        queue_ms_median: wire.a_to_b.queue_us_median as f64 / 1e3,
        queue_ms_p95: wire.a_to_b.queue_us_p95 as f64 / 1e3,
        repeated_packets: sent.repeated_packets,
        cpu_s_per_gib: Cpu {
            sender: a_gib(sent.cpu_s),
            receiver: a_gib(received.cpu_s),
            relay: a_gib(wire.cpu_s),
        },
        rates_mbit: account::rates_mbit(&received.samples, sent.began_us, end_us),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::DirectionStats;
    use crate::transfer::Sample;

    /// 1000 full TCP packets over 12 ms of a link of 1 Gbit/s, a quarter of them in the last 3 ms.
    fn transfer() -> (Sent, Received, Stats) {
        let way = DirectionStats {
            sent_bytes: 1_500_000,
            delivered_packets: 1000,
            delivered_bytes: 1_500_000,
            queue_us_median: 2_500,
            ..DirectionStats::default()
        };
        let wire = Stats { a_to_b: way, cpu_s: 1.0, ..Stats::default() };
        let at = |at_us, flow_bytes| Sample { at_us, flow_bytes, device_bytes: flow_bytes };
        let received = Received {
            last_us: 5_024_000,
            payload_bytes: 1_448_000,
            cpu_s: 0.5,
            samples: vec![at(5_000_000, 0), at(5_012_000, 1_125_000), at(5_024_000, 1_500_000)],
        };
        let sent = Sent { began_us: 5_000_000, cpu_s: 0.25, ..Sent::default() };
        (sent, received, wire)
    }

    #[test]
    fn goodput_is_of_the_time_that_was_taken_or_given() {
        let profile = Profile::named("metro").unwrap();
        let carrier = Carrier { profile: &profile, up_us: 1_000_000 };
        let (sent, received, wire) = transfer();
        let of = |bound| figures(carrier, Tool::TcpBbr, bound, &sent, &received, &wire);
        let whole = of(Bound::Bytes(1_448_000));
        // The link carries 3 MB in 24 ms.
        assert!((whole.goodput - 0.5).abs() < 1e-9, "{whole:?}");
        assert!((whole.seconds - 0.024).abs() < 1e-9 && whole.waste == 0.0, "{whole:?}");
        assert_eq!((whole.payload_bytes, whole.queue_ms_median), (1_448_000, 2.5));
        let gib = f64::from(1 << 30) / 1_448_000.0;
        assert!((whole.cpu_s_per_gib.receiver - 0.5 * gib).abs() < 1e-6, "{whole:?}");
        let timed = of(Bound::Seconds(0.012));
        assert!((timed.goodput - 0.75).abs() < 1e-9, "{timed:?}");
        assert_eq!((timed.payload_bytes, timed.total_bytes), (1_086_000, 1_448_000));
    }

    #[test]
    fn what_did_not_arrive_is_a_failure() {
        let (_, received, _) = transfer();
        assert_eq!(why_incomplete(Bound::Bytes(1_448_000), &received), "");
        assert!(why_incomplete(Bound::Bytes(2_000_000), &received).contains("1448000 of 2000000"));
        assert_eq!(why_incomplete(Bound::Seconds(1.0), &Received::default()), "nothing arrived");
    }
}
