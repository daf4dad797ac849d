//! `[scheduler]`: for whom this agent plans, and whom it obeys.
//!
//! Invariant: an agent plans for nobody and obeys nobody unless its file says so, and a planner's own
//! rules contradict each other nowhere: what the file says of sites and hosts is checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use longhaul_transport::BitRate;
use serde::Deserialize;
use toml::Spanned;

use super::{ConfigError, Problem, Source, problem, valid_name};

/// How often hosts are asked and a plan is made, when the file does not say.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(300);
/// Seconds between two plans.
const INTERVAL_S: std::ops::RangeInclusive<u64> = 1..=3600;
/// What is thought of a link that has carried nothing yet, when the file does not say: the median of
/// single streams between distant cloud regions is between 91 and 300 Mbit/s.
const DEFAULT_LINK_BITS_PER_S: u64 = 100_000_000;
/// Marks when the file does not say, in percent of a host's CPU.
const DEFAULT_MARKS: (u32, u32) = (80, 75);
/// Moves in an hour when the file does not say.
const DEFAULT_MOVES_PER_HOUR: usize = 10;
/// Rest of a VM that moved when the file does not say.
const DEFAULT_COOLDOWN: Duration = Duration::from_secs(3600);
/// A cooldown beyond a week is a VM that should be pinned.
const COOLDOWN_S_MAX: u64 = 7 * 24 * 3600;

/// Who plans, for whom, and by which rules.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerConfig {
    /// Peers that this agent plans for, besides itself; it plans for nobody if it is empty.
    pub hosts: Vec<String>,
    /// Moves against hot hosts are made, not only planned.
    pub acts: bool,
    /// Time between two plans.
    pub interval: Duration,
    /// The peer that may see this host's load and order moves of its VMs.
    pub obeys: Option<String>,
    /// Cores that VMs may use here, where others have the rest: then only what VMs ask for counts.
    pub cores: Option<f64>,
    /// What a link is thought to carry that has carried nothing yet.
    pub link: BitRate,
    /// Shares of a host's CPU from which on it is hot, and at which it has been relieved.
    pub marks: (f64, f64),
    /// Moves that may start within an hour.
    pub moves_per_hour: usize,
    /// How long a VM rests that has moved.
    pub cooldown: Duration,
    /// Hosts by site, this one under its own name.
    pub sites: BTreeMap<String, Vec<String>>,
    /// Rules for VMs by their names.
    pub vms: BTreeMap<String, VmRules>,
}

/// What the planner must know of a VM that cannot be seen.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRules {
    /// What it is worth to save it, beside others.
    #[serde(default = "one")]
    pub weight: f64,
    /// It stays where it is, an evacuation included.
    #[serde(default)]
    pub pinned: bool,
    /// VMs of one group share a host.
    pub together: Option<String>,
    /// VMs of one group never share a host.
    pub apart: Option<String>,
}

fn one() -> f64 {
    1.0
}

impl Default for VmRules {
    fn default() -> Self {
        Self { weight: one(), pinned: false, together: None, apart: None }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct SchedulerTyped {
    #[serde(default)]
    hosts: Vec<Spanned<String>>,
    act: Option<bool>,
    interval_s: Option<Spanned<u64>>,
    obeys: Option<Spanned<String>>,
    cores: Option<Spanned<f64>>,
    link: Option<Spanned<String>>,
    hot_percent: Option<Spanned<u32>>,
    cool_percent: Option<Spanned<u32>>,
    moves_per_hour: Option<usize>,
    cooldown_s: Option<Spanned<u64>>,
    #[serde(default)]
    sites: BTreeMap<String, Spanned<Vec<String>>>,
    #[serde(default)]
    vms: BTreeMap<String, Spanned<VmRules>>,
}

impl SchedulerTyped {
    /// `own` is this host's name.
    pub(super) fn meaning(
        &self,
        source: &Source<'_>,
        own: &str,
    ) -> Result<SchedulerConfig, ConfigError> {
        let name = |name: &String| valid_name(name).map(|()| name.clone());
        let other = |host: &String| match host == own {
            true => Err(problem("this host is planned for anyway", "name its peers")),
            false => name(host),
        };
        let hosts: Result<Vec<String>, _> =
            self.hosts.iter().map(|host| source.checked(host, other)).collect();
        let hosts = hosts?;
        let (hot, cool) = DEFAULT_MARKS;
        let hot =
            self.hot_percent.as_ref().map_or(Ok(hot), |mark| source.checked(mark, percent))?;
        let below = |mark: &u32| match percent(mark)? {
            mark if mark < hot => Ok(mark),
            mark => Err(problem(
                format!("a host that is hot from {hot} % on cannot be relieved at {mark} %"),
                format!("write less than {hot}"),
            )),
        };
        let cool = match &self.cool_percent {
            Some(mark) => source.checked(mark, below)?,
            None => cool.min(hot.saturating_sub(5)).max(1),
        };
        let seconds = |value: &Option<Spanned<u64>>, range: std::ops::RangeInclusive<u64>, or| {
            let check = |s: &u64| match range.contains(s) {
                true => Ok(Duration::from_secs(*s)),
                false => Err(problem(
                    format!("{s} s cannot be"),
                    format!("write {} to {}", range.start(), range.end()),
                )),
            };
            value.as_ref().map_or(Ok(or), |value| source.checked(value, check))
        };
        let link = |text: &String| {
            let refused = || problem(format!("`{text}` is not a rate"), "write e.g. \"200M\"");
            text.parse::<BitRate>().map_err(|_| refused())
        };
        let cores = |cores: &f64| match *cores {
            cores if cores.is_finite() && cores > 0.0 => Ok(cores),
            cores => Err(problem(format!("{cores} cores cannot be"), "write e.g. 8 or 0.5")),
        };
        let obeys = self.obeys.as_ref().map(|obeys| source.checked(obeys, name)).transpose()?;
        Ok(SchedulerConfig {
            acts: self.act.unwrap_or(false),
            interval: seconds(&self.interval_s, INTERVAL_S, DEFAULT_INTERVAL)?,
            obeys,
            cores: self.cores.as_ref().map(|value| source.checked(value, cores)).transpose()?,
            link: match &self.link {
                Some(text) => source.checked(text, link)?,
                None => BitRate::from_bits_per_second(DEFAULT_LINK_BITS_PER_S),
            },
            marks: (f64::from(hot) / 100.0, f64::from(cool) / 100.0),
            moves_per_hour: self.moves_per_hour.unwrap_or(DEFAULT_MOVES_PER_HOUR),
            cooldown: seconds(&self.cooldown_s, 0..=COOLDOWN_S_MAX, DEFAULT_COOLDOWN)?,
            sites: self.sites(source, own, &hosts)?,
            vms: source.entries(&self.vms, rules)?,
            hosts,
        })
    }

    /// Every host of a site is planned for, and of one site only.
    fn sites(
        &self,
        source: &Source<'_>,
        own: &str,
        hosts: &[String],
    ) -> Result<BTreeMap<String, Vec<String>>, ConfigError> {
        let mut placed = BTreeSet::new();
        let mut sites = BTreeMap::new();
        for (site, members) in &self.sites {
            let check = |members: &Vec<String>| {
                valid_name(site)?;
                for host in members {
                    if host != own && !hosts.contains(host) {
                        let what = format!("`{host}` of site {site} is not planned for");
                        return Err(problem(what, "name it in scheduler.hosts, or leave it out"));
                    }
                    if placed.contains(host) {
                        let what = format!("`{host}` is in two sites");
                        return Err(problem(what, "leave it in one"));
                    }
                }
                Ok(members.clone())
            };
            let members = source.checked(members, check)?;
            placed.extend(members.iter().cloned());
            sites.insert(site.clone(), members);
        }
        Ok(sites)
    }
}

fn percent(mark: &u32) -> Result<u32, Problem> {
    match *mark {
        1..=100 => Ok(*mark),
        mark => Err(problem(format!("{mark} % of a host cannot be"), "write 1 to 100")),
    }
}

fn rules(rules: &VmRules) -> Result<VmRules, Problem> {
    if rules.weight.is_finite() && rules.weight > 0.0 {
        return Ok(rules.clone());
    }
    Err(problem(format!("a weight of {} cannot be", rules.weight), "write a number above 0"))
}
