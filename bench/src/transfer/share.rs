//! Several flows at once over one WAN: what each of them gets.
//!
//! Invariant: shares are of a time in which all flows ran and were warm; a flow that fails fails the
//! run, because what the others got then means nothing.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::account::{self, Carrier, bytes_at, of_flow};
use super::caps::Caps;
use super::flow::{self, Asked, Flow};
use super::link::{bring_up, origin, possible, take_down_on_signal};
use super::rows::{self, Row, ShareFigures, ShareFlow, ShareRow};
use super::{Bound, Received, Sample, Sent, Tool, summary};
use crate::interrupt;
use crate::profile::Profile;
use crate::relay::Stats;
use crate::row::{self, Revision};
use crate::wan::Wan;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Plan {
    /// The flows' tools, in the order in which they begin.
    #[arg(long, value_enum, value_delimiter = ',', required = true)]
    pub flows: Vec<Tool>,
    /// Seconds from the begin of the first flow to the end of all.
    #[arg(long, default_value_t = 40.0)]
    pub seconds: f64,
    /// Seconds from the begin of a flow to the begin of the next one.
    #[arg(long, default_value_t = 0.0)]
    pub stagger: f64,
    /// An earlier end of a flow, as FLOW=SECONDS: the flow's number from 1, and seconds from the
    /// begin of the first flow. May be given for several flows.
    #[arg(long, value_parser = parse_end)]
    pub stop_after: Vec<(usize, f64)>,
    /// Seconds after the begin of the last flow from which on shares are counted.
    #[arg(long, default_value_t = 10.0)]
    pub warm_up: f64,
    /// How many runs; the n-th one has the WAN's seed plus n - 1.
    #[arg(long, default_value_t = 1)]
    pub runs: u32,
    /// Decides the WAN's losses in the first run.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where rows are appended.
    #[arg(long)]
    pub results: PathBuf,
}

fn parse_end(text: &str) -> Result<(usize, f64)> {
    let (flow, seconds) = text.split_once('=').context("not FLOW=SECONDS")?;
    Ok((flow.parse()?, seconds.parse()?))
}

/// How long after its time a flow may take to end before it is told to.
const END_WAIT: Duration = Duration::from_secs(10);
/// What cannot be is a time of less than this.
const WINDOW_S_MIN: f64 = 1.0;

impl Plan {
    /// When each flow begins and ends, in seconds from the first begin; and when all run and are warm.
    fn times(&self) -> Result<(Vec<[f64; 2]>, [f64; 2])> {
        for (flow, _) in &self.stop_after {
            let is_known = (1..=self.flows.len()).contains(flow);
            ensure!(is_known, "there is no flow {flow} of {} to end", self.flows.len());
        }
        let end = |flow: usize| {
            let early = self.stop_after.iter().find(|(number, _)| *number == flow + 1);
            early.map_or(self.seconds, |(_, end)| end.min(self.seconds))
        };
        let times: Vec<_> =
            (0..self.flows.len()).map(|flow| [flow as f64 * self.stagger, end(flow)]).collect();
        let from = times.iter().map(|[begin, _]| begin).fold(0.0, |a: f64, b| a.max(*b));
        let to = times.iter().map(|[_, end]| *end).fold(self.seconds, f64::min);
        let window = [from + self.warm_up, to];
        ensure!(
            window[1] - window[0] >= WINDOW_S_MIN,
            "from {:.1} s, when all flows run and are warm, to {to:.1} s, when the first one ends, \
             is no time for a measurement",
            window[0]
        );
        Ok((times, window))
    }
}

/// Does all runs of a plan over the WAN `profile`, appends a row for each and prints a table.
///
/// # Errors
///
/// The first run that fails.
pub fn run(plan: &Plan, profile: &Profile) -> Result<()> {
    ensure!(possible(&plan.flows).len() == plan.flows.len(), "a flow is missing");
    let daemons = plan.flows.iter().filter(|tool| **tool == Tool::Rsync).count();
    ensure!(daemons <= 1, "one of the flows may be rsync, not {daemons}");
    let (times, window) = plan.times()?;
    let revision = Revision::current()?;
    take_down_on_signal()?;
    let mut rows = Vec::new();
    for run in 1..=plan.runs {
        let row = interrupt::or_came(one(plan, profile, &times, window, &revision, run))
            .with_context(|| format!("in run {run}"))?;
        let row = Row::Share(Box::new(row));
        eprint!("run {run}: {}", summary::table(&summary::summarise(std::slice::from_ref(&row))));
        row::append(&plan.results, &row)?;
        rows.push(row);
    }
    print!("{}", summary::table(&summary::summarise(&rows)));
    Ok(())
}

fn one(
    plan: &Plan,
    profile: &Profile,
    times: &[[f64; 2]],
    window: [f64; 2],
    revision: &Revision,
    run: u32,
) -> Result<ShareRow> {
    let seed = plan.seed + u64::from(run - 1);
    let scratch = tempfile::tempdir()?;
    let mut orders = Vec::new();
    for (number, (&tool, [begin, end])) in plan.flows.iter().zip(times).enumerate() {
        let time = Duration::try_from_secs_f64(end - begin)
            .with_context(|| format!("the flow {} would end before it begins", number + 1))?;
        let asked = Asked {
            caps: Caps::default(),
            tool,
            bound: Bound::Seconds(time.as_secs_f64()),
            is_drained: false,
            give_up: time + END_WAIT,
        };
        let order = flow::prepare(scratch.path().join(number.to_string()), &asked, profile)?;
        orders.push((order, asked.give_up));
    }
    interrupt::check()?;
    let (wan, up_us) = bring_up(profile, seed)?;
    let mut flows = Vec::new();
    for (order, give_up) in orders {
        flows.push(Flow::listen(&wan, order, give_up)?);
    }
    let done = transfer_all(&wan, flows, times)?;
    let wire = wan.stats()?;
    let names = plan.flows.iter().map(|tool| Ok((tool.name(), rows::version(*tool)?)));
    let names = names.collect::<Result<Vec<_>>>()?;
    let ends_early: Vec<bool> = times.iter().map(|[_, end]| *end < plan.seconds).collect();
    let carrier = Carrier { profile, up_us };
    let figures = figures(carrier, names, &done, &ends_early, window, &wire);
    Ok(ShareRow { origin: origin(revision, profile, seed, run)?, figures, wire })
}

/// Lets every flow begin at its time and waits for all of them.
fn transfer_all(wan: &Wan, flows: Vec<Flow>, times: &[[f64; 2]]) -> Result<Vec<(Sent, Received)>> {
    std::thread::scope(|scope| {
        let transfer = |(flow, &[begin, _]): (Flow, &[f64; 2])| {
            scope.spawn(move || {
                interrupt::sleep(Duration::from_secs_f64(begin))?;
                flow.transfer(wan)
            })
        };
        let threads: Vec<_> = flows.into_iter().zip(times).map(transfer).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

fn figures(
    carrier: Carrier<'_>,
    names: Vec<(String, String)>,
    done: &[(Sent, Received)],
    ends_early: &[bool],
    window_s: [f64; 2],
    wire: &Stats,
) -> ShareFigures {
    let zero_us = done.iter().map(|(sent, _)| sent.began_us).min().unwrap_or(0);
    let over_us = done.iter().map(|(sent, _)| sent.ended_us).max().unwrap_or(0);
    let [from, to] = window_s.map(|s| zero_us + (s * 1e6) as u64);
    let got =
        |samples: &[Sample]| bytes_at(samples, of_flow, to) - bytes_at(samples, of_flow, from);
    let bytes: Vec<f64> = done.iter().map(|(_, received)| got(&received.samples)).collect();
    let all: f64 = bytes.iter().sum();
    let since = |at: u64| at.saturating_sub(zero_us) as f64 / 1e6;
    let flows = names.into_iter().zip(done).zip(&bytes);
    let flows = flows.map(|(((tool, tool_version), (sent, received)), bytes)| ShareFlow {
        tool,
        tool_version,
        ran_s: [since(sent.began_us), since(sent.ended_us)],
        share: bytes / all.max(1.0),
        mbit_per_s: bytes * 8.0 / (to - from).max(1) as f64,
        rates_mbit: account::rates_mbit(&received.samples, zero_us, over_us),
    });
    let ended = done.iter().zip(ends_early).filter(|(_, early)| **early);
    let stopped_us = ended.map(|((sent, _), _)| sent.ended_us).max();
    let stay = done.iter().zip(ends_early).filter(|(_, early)| !**early);
    let stay: Vec<&[Sample]> = stay.map(|((_, received), _)| &*received.samples).collect();
    ShareFigures {
        jain: account::jain(&bytes),
        used: all / carrier.bytes(from, to).max(1.0),
        recovery_s: stopped_us.and_then(|stopped| carrier.recovery_s(&stay, stopped)),
        flows: flows.collect(),
        window_s,
        queue_ms_median: wire.a_to_b.queue_us_median as f64 / 1e3,
        queue_ms_p95: wire.a_to_b.queue_us_p95 as f64 / 1e3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(stop_after: Vec<(usize, f64)>) -> Plan {
        Plan {
            flows: vec![Tool::Longhaul, Tool::TcpCubic],
            seconds: 40.0,
            stagger: 5.0,
            stop_after,
            warm_up: 10.0,
            runs: 1,
            seed: 1,
            results: PathBuf::new(),
        }
    }

    #[test]
    fn shares_are_of_the_time_in_which_all_ran() {
        let (times, window) = plan(vec![]).times().unwrap();
        assert_eq!((times, window), (vec![[0.0, 40.0], [5.0, 40.0]], [15.0, 40.0]));
        let (times, window) = plan(vec![parse_end("2=25").unwrap()]).times().unwrap();
        assert_eq!((times, window), (vec![[0.0, 40.0], [5.0, 25.0]], [15.0, 25.0]));
        assert!(plan(vec![(2, 15.5)]).times().is_err(), "half a second says nothing");
        assert!(plan(vec![(3, 25.0)]).times().is_err(), "there are two");
        assert!(parse_end("2").is_err() && parse_end("a=b").is_err());
    }

    #[test]
    fn figures_are_of_the_window_and_of_who_stays() {
        let profile = Profile::named("continental").unwrap();
        let carrier = Carrier { profile: &profile, up_us: 0 };
        // The first has 3/4 of 200 Mbit/s from the start, and all from 25 s on, when the second ends.
        let samples = |bytes: fn(u64) -> u64| -> Vec<Sample> {
            let sample = |i: u64| {
                let flow_bytes = bytes(i * 20);
                Sample { at_us: i * 20_000, flow_bytes, device_bytes: 0 }
            };
            (0..=2000).map(sample).collect()
        };
        let first = samples(|ms| ms * 18_750 + ms.saturating_sub(25_000) * 6_250);
        let second = samples(|ms| ms.min(25_000) * 6_250);
        let flow = |ended_us, samples| {
            (Sent { ended_us, ..Sent::default() }, Received { samples, ..Received::default() })
        };
        let done = [flow(40_000_000, first), flow(25_000_000, second)];
        let names = ["longhaul", "tcp-cubic"].map(|name| (name.to_owned(), String::new())).into();
        let window = [15.0, 25.0];
        let figures = figures(carrier, names, &done, &[false, true], window, &Stats::default());
        let shares: Vec<f64> = figures.flows.iter().map(|flow| flow.share).collect();
        assert_eq!(shares, [0.75, 0.25]);
        assert!((figures.used - 1.0).abs() < 1e-9 && (figures.jain - 0.8).abs() < 1e-9);
        assert_eq!(figures.flows[0].rates_mbit.len(), 80);
        assert_eq!((figures.flows[0].rates_mbit[0], figures.flows[1].mbit_per_s), (150.0, 50.0));
        assert_eq!(figures.recovery_s, Some(0.5));
    }
}
