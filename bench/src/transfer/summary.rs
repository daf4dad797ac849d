//! What is printed of rows: medians by profile and tool, and ratios.
//!
//! Invariant: a failed row is in no median, and is counted where the medians are shown.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Tool;
use super::rows::{Cpu, Figures, LinkRow, Row, ShareFigures, ShareRow};
use crate::row::median;

/// What is printed of the rows of one profile and tool: medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkSummary {
    /// The WAN's name.
    pub profile: String,
    /// The tool's name.
    pub tool: String,
    /// How many rows.
    pub runs: usize,
    /// How many of them failed; the medians are of the others.
    pub failed: usize,
    /// [`Figures::goodput`].
    pub goodput: f64,
    /// The worst of it.
    pub goodput_min: f64,
    /// [`Figures::mbit_per_s`].
    pub mbit_per_s: f64,
    /// Longhaul's median goodput of the same profile over this one, where there is one.
    pub longhaul_times: Option<f64>,
    /// [`Figures::waste`].
    pub waste: f64,
    /// [`Figures::start_round_trips`] of the runs that started.
    pub start_round_trips: f64,
    /// How many runs started.
    pub started: usize,
    /// [`Figures::queue_ms_median`].
    pub queue_ms_median: f64,
    /// [`Figures::queue_ms_p95`].
    pub queue_ms_p95: f64,
    /// [`Figures::cpu_s_per_gib`].
    pub cpu_s_per_gib: Cpu,
}

/// What is printed of the rows of one profile and set of flows: medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShareSummary {
    /// The WAN's name.
    pub profile: String,
    /// The flows' tools.
    pub flows: Vec<String>,
    /// How many rows.
    pub runs: usize,
    /// Share of each flow.
    pub shares: Vec<f64>,
    /// [`ShareFigures::jain`].
    pub jain: f64,
    /// [`ShareFigures::used`].
    pub used: f64,
    /// [`ShareFigures::recovery_s`] of the runs that have it.
    pub recovery_s: Option<f64>,
    /// [`ShareFigures::queue_ms_median`].
    pub queue_ms_median: f64,
}

/// Medians of rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Of one flow at a time, by profile and tool.
    pub link: Vec<LinkSummary>,
    /// Of several flows at once, by profile and flows.
    pub share: Vec<ShareSummary>,
}

/// Summarises rows, in the order in which profiles and tools first come.
pub fn summarise(rows: &[Row]) -> Summary {
    let (mut link, mut share) = (Groups::new(), Groups::new());
    for row in rows {
        match row {
            Row::Link(row) => {
                link.add((row.origin.profile.name.clone(), vec![row.tool.clone()]), &**row);
            }
            Row::Share(row) => {
                let tools = row.figures.flows.iter().map(|flow| flow.tool.clone()).collect();
                share.add((row.origin.profile.name.clone(), tools), &**row);
            }
        }
    }
    let mut link: Vec<_> = link.in_order().map(|(key, rows)| of_link(key, &rows)).collect();
    let ours: BTreeMap<_, _> = link
        .iter()
        .filter(|summary| summary.tool == Tool::Longhaul.name())
        .map(|summary| (summary.profile.clone(), summary.goodput))
        .collect();
    for summary in &mut link {
        let base = ours.get(&summary.profile).filter(|_| summary.goodput > 0.0);
        summary.longhaul_times = base.map(|ours| ours / summary.goodput);
    }
    let share = share.in_order().map(|(key, rows)| of_share(key, &rows)).collect();
    Summary { link, share }
}

type Key = (String, Vec<String>);

/// Rows by key, keys in the order in which they came.
struct Groups<'a, T>(Vec<(Key, Vec<&'a T>)>);

impl<'a, T> Groups<'a, T> {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn add(&mut self, key: Key, row: &'a T) {
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, rows)) => rows.push(row),
            None => self.0.push((key, vec![row])),
        }
    }

    fn in_order(self) -> impl Iterator<Item = (Key, Vec<&'a T>)> {
        self.0.into_iter()
    }
}

fn of_link((profile, tools): Key, rows: &[&LinkRow]) -> LinkSummary {
    let well: Vec<&Figures> =
        rows.iter().filter(|row| row.failed.is_empty()).map(|row| &row.figures).collect();
    let of = |value: fn(&Figures) -> f64| median(well.iter().map(|figures| value(figures)));
    let worst = well.iter().map(|figures| figures.goodput).min_by(f64::total_cmp);
    let starts: Vec<f64> = well.iter().filter_map(|figures| figures.start_round_trips).collect();
    LinkSummary {
        profile,
        tool: tools.concat(),
        runs: rows.len(),
        failed: rows.len() - well.len(),
        goodput: of(|f| f.goodput),
        goodput_min: worst.unwrap_or(0.0),
        mbit_per_s: of(|f| f.mbit_per_s),
        longhaul_times: None,
        waste: of(|f| f.waste),
        started: starts.len(),
        start_round_trips: median(starts.into_iter()),
        queue_ms_median: of(|f| f.queue_ms_median),
        queue_ms_p95: of(|f| f.queue_ms_p95),
        cpu_s_per_gib: Cpu {
            sender: of(|f| f.cpu_s_per_gib.sender),
            receiver: of(|f| f.cpu_s_per_gib.receiver),
            relay: of(|f| f.cpu_s_per_gib.relay),
        },
    }
}

fn of_share((profile, flows): Key, rows: &[&ShareRow]) -> ShareSummary {
    let of = |value: fn(&ShareFigures) -> f64| median(rows.iter().map(|row| value(&row.figures)));
    let recoveries: Vec<f64> = rows.iter().filter_map(|row| row.figures.recovery_s).collect();
    let share = |i: usize| median(rows.iter().map(|row| row.figures.flows[i].share));
    ShareSummary {
        profile,
        shares: (0..flows.len()).map(share).collect(),
        flows,
        runs: rows.len(),
        jain: of(|f| f.jain),
        used: of(|f| f.used),
        recovery_s: (!recoveries.is_empty()).then(|| median(recoveries.into_iter())),
        queue_ms_median: of(|f| f.queue_ms_median),
    }
}

/// Tables for people.
pub fn table(summary: &Summary) -> String {
    let mut text = String::new();
    if !summary.link.is_empty() {
        text += &format!(
            "{:<17} {:<12} {:>5} {:>6} {:>6} {:>8} {:>9} {:>7} {:>6} {:>13} {:>17}\n",
            "profile",
            "tool",
            "runs",
            "link %",
            "worst",
            "Mbit/s",
            "longhaul",
            "waste %",
            "start",
            "queue ms",
            "CPU s/GiB"
        );
    }
    for line in &summary.link {
        let runs = match line.failed {
            0 => line.runs.to_string(),
            failed => format!("{}-{failed}", line.runs),
        };
        let times = line.longhaul_times.map_or_else(|| "-".to_owned(), |x| format!("{x:.2}x"));
        // In round trips; never, if most runs did not start.
        let start = if 2 * line.started > line.runs {
            format!("{:.1}", line.start_round_trips)
        } else {
            "-".to_owned()
        };
        let cpu = line.cpu_s_per_gib;
        text += &format!(
            "{:<17} {:<12} {runs:>5} {:>6.1} {:>6.1} {:>8.1} {times:>9} {:>7.2} {start:>6} {:>13} {:>17}\n",
            line.profile,
            line.tool,
            line.goodput * 100.0,
            line.goodput_min * 100.0,
            line.mbit_per_s,
            line.waste * 100.0,
            format!("{:.1}, {:.1}", line.queue_ms_median, line.queue_ms_p95),
            format!("{:.1} {:.1} ({:.1})", cpu.sender, cpu.receiver, cpu.relay),
        );
    }
    for line in &summary.share {
        let shares: Vec<String> = line
            .flows
            .iter()
            .zip(&line.shares)
            .map(|(tool, share)| format!("{tool} {:.1} %", share * 100.0))
            .collect();
        let recovery = line.recovery_s.map_or_else(String::new, |s| {
            format!(", 95 % of the link {s:.1} s after the end of the others")
        });
        text += &format!(
            "{}, {} runs: {}; Jain {:.3}, {:.1} % of the link used, queue {:.1} ms{recovery}\n",
            line.profile,
            line.runs,
            shares.join(", "),
            line.jain,
            line.used * 100.0,
            line.queue_ms_median,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::rows::tests::{link, share};

    #[test]
    fn medians_leave_failures_out_and_ratios_are_longhauls() {
        let rows = [
            link(Tool::TcpCubic, 0.1, ""),
            link(Tool::Longhaul, 0.9, ""),
            link(Tool::TcpCubic, 0.3, ""),
            link(Tool::TcpCubic, 0.0, "it broke"),
            link(Tool::TcpCubic, 0.2, ""),
        ];
        let summary = summarise(&rows).link;
        let [cubic, ours] = summary.as_slice() else { panic!("{summary:?}") };
        assert_eq!((cubic.tool.as_str(), cubic.runs, cubic.failed), ("tcp-cubic", 4, 1));
        assert_eq!((cubic.goodput, cubic.goodput_min), (0.2, 0.1));
        assert_eq!((cubic.longhaul_times, ours.longhaul_times), (Some(0.9 / 0.2), Some(1.0)));
        let text = table(&summarise(&rows));
        assert!(text.contains("4.50x") && text.contains("4-1"), "{text}");
    }

    #[test]
    fn shares_are_those_of_each_flow() {
        let rows = [share([0.4, 0.6], None), share([0.5, 0.5], Some(3.0)), share([0.6, 0.4], None)];
        let summary = summarise(&rows).share;
        let [both] = summary.as_slice() else { panic!("{summary:?}") };
        assert_eq!((both.runs, both.shares.as_slice()), (3, &[0.5, 0.5][..]));
        assert_eq!(both.recovery_s, Some(3.0));
        assert!(table(&summarise(&rows)).contains("longhaul 50.0 %, longhaul 50.0 %; Jain 1.000"));
    }
}
