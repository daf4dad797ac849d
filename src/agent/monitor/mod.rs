//! What this host and its VMs have asked for lately.
//!
//! Invariant: a figure is a mean over real time between two samples of the same process, so a VM that
//! was started anew, a clock that jumps (none is read but the monotonic one) or a sample that failed
//! makes a gap, never a wrong rate. What is kept is bounded: [`SAMPLES_MAX`] for the host and each VM, and two
//! weeks of them by the slot, on disk ([`profiles`]).

mod kernel;
mod profile;
mod profiles;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::jobs::Jobs;
use super::links::Links;
use super::registry::Registry;
use crate::units::MIB;
use kernel::{HostCounters, ProcessCounters};
use longhaul_scheduler::season::Outlook;
use profiles::Profiles;

pub(crate) use profile::{PER_DAY, Pair, SLOT_S};

/// Samples that are kept of each series: half an hour at the longest period.
const SAMPLES_MAX: usize = 120;
/// How long one VM's monitor may take to tell what was written.
const ASK_WAIT: Duration = Duration::from_secs(2);

/// The samples.
#[derive(Debug)]
pub(crate) struct Monitor {
    period: Duration,
    /// Cores that the host's VMs may use; where an operator says so, only what VMs use counts.
    cores: Option<f64>,
    seen: Mutex<Seen>,
    profiles: Mutex<Profiles>,
}

#[derive(Debug, Default)]
struct Seen {
    host: VecDeque<(Instant, HostCounters)>,
    vms: BTreeMap<String, Trail>,
}

/// One VM's samples, all of one process.
#[derive(Debug)]
struct Trail {
    pid: i32,
    samples: VecDeque<(Instant, VmCounters)>,
}

#[derive(Debug, Clone, Copy)]
struct VmCounters {
    process: ProcessCounters,
    written_bytes: Option<u64>,
}

/// What a host asked for, in the mean over some time.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Means {
    /// Since the newest sample; none before the second.
    pub(crate) age: Option<Duration>,
    pub(crate) cores: f64,
    pub(crate) cpu: f64,
    pub(crate) memory_mib: u64,
    pub(crate) pressure: Option<f64>,
    pub(crate) network_bytes_s: (f64, f64),
    pub(crate) vms: BTreeMap<String, VmMeans>,
    /// VMs whose process was there at the newest sample.
    pub(crate) running: BTreeSet<String>,
}

/// What a VM asked for, in the mean over some time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct VmMeans {
    pub(crate) cpu: f64,
    waited: f64,
    pub(crate) written_bytes_s: f64,
}

impl Monitor {
    /// A monitor that has seen nothing since it was started; [`watch`](Self::watch) fills it. What was seen
    /// before is in the state folder.
    pub(crate) fn new(period: Duration, cores: Option<f64>, state_dir: &Path) -> Self {
        let profiles = Mutex::new(Profiles::open(state_dir.join(profiles::FOLDER)));
        Self { period, cores, seen: Mutex::default(), profiles }
    }

    /// Takes samples until it is dropped.
    pub(crate) async fn watch(&self, registry: &Registry, jobs: &Jobs, links: &Links) {
        let mut sent = None;
        let mut tick = tokio::time::interval(self.period);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.sample(registry, jobs).await;
            self.profile(links, &mut sent);
        }
    }

    async fn sample(&self, registry: &Registry, jobs: &Jobs) {
        let mut running = Vec::new();
        for entry in registry.book().all() {
            let vm = entry.vm.name;
            // One that moves has better things to do, and its monitor too; its process is still seen.
            let is_moved = jobs.follow(&vm).is_ok();
            // One that is starting is looked at the next time, and holds up nobody else's sample.
            if registry.is_busy(&vm) {
                continue;
            }
            let handle = tokio::time::timeout(ASK_WAIT, registry.handle(&vm)).await;
            let Ok(Ok(handle)) = handle else { continue };
            let written = if is_moved {
                None
            } else {
                let stats = handle.qmp.execute("query-blockstats", json!({}));
                tokio::time::timeout(ASK_WAIT, stats).await.ok().and_then(Result::ok)
            };
            running.push((vm, handle.process.pid, written.as_ref().and_then(written_bytes)));
        }
        let sampled = tokio::task::spawn_blocking(move || {
            let vms = running.into_iter().filter_map(|(vm, pid, written_bytes)| {
                Some((vm, pid, VmCounters { process: kernel::process(pid)?, written_bytes }))
            });
            (Instant::now(), kernel::host(), vms.collect::<Vec<_>>())
        });
        if let Ok((at, host, vms)) = sampled.await {
            self.take(at, host, vms);
        }
    }

    /// Adds the newest sample to the profiles. `sent` is when we looked last, and what we had sent by then.
    fn profile(&self, links: &Links, sent: &mut Option<(Instant, u64)>) {
        let means = self.means(self.period);
        let ours: u64 = links.all().iter().map(|link| link.carried.wire_bytes_sent).sum();
        let now = Instant::now();
        let before = sent.replace((now, ours));
        // Without our own part nobody knows that of others.
        let host = before.filter(|_| means.age.is_some()).map(|(at, before)| {
            let ours = ours.saturating_sub(before) as f64 / now.duration_since(at).as_secs_f64();
            [(means.network_bytes_s.1 - ours).max(0.0) / MIB, means.cpu]
        });
        let vms = means.vms.iter().map(|(vm, of)| (vm.clone(), [of.cpu, of.written_bytes_s / MIB]));
        let now_s = jiff::Timestamp::now().as_second();
        self.profiles().see(now_s, host.filter(|pair| pair[0].is_finite()), vms);
    }

    /// What a VM did in each slot before that of `now_s`, the newest last: cores used, and MiB a second
    /// written; nothing if it was never seen here.
    pub(crate) fn history(&self, vm: &str, now_s: i64) -> Option<Vec<Pair>> {
        self.profiles().vm(vm, now_s)
    }

    /// What others than us are expected to send from this host in so many slots from that of `from_s` on, in
    /// MiB a second; nothing while that is not known.
    pub(crate) fn uplink(&self, from_s: i64, slots: usize) -> Vec<Outlook> {
        self.profiles().uplink(from_s, slots)
    }

    fn profiles(&self) -> MutexGuard<'_, Profiles> {
        self.profiles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, at: Instant, host: Option<HostCounters>, vms: Vec<(String, i32, VmCounters)>) {
        let mut seen = self.seen();
        if let Some(host) = host {
            push(&mut seen.host, (at, host));
        }
        let pids: BTreeMap<&str, i32> = vms.iter().map(|(vm, pid, _)| (&**vm, *pid)).collect();
        seen.vms.retain(|vm, trail| pids.get(&**vm) == Some(&trail.pid));
        for (vm, pid, counters) in vms {
            let fresh = || Trail { pid, samples: VecDeque::new() };
            push(&mut seen.vms.entry(vm).or_insert_with(fresh).samples, (at, counters));
        }
    }

    /// The means over the last `over`, or over less if there is not so much.
    pub(crate) fn means(&self, over: Duration) -> Means {
        let seen = self.seen();
        let mut means =
            Means { cores: self.cores.unwrap_or_else(kernel::cores), ..Means::default() };
        let mut resident_mib = 0;
        for (vm, trail) in &seen.vms {
            means.running.insert(vm.clone());
            if let Some((first, last, passed_s)) = ends(&trail.samples, over) {
                let rate = |of: fn(&ProcessCounters) -> f64| {
                    ((of(&last.process) - of(&first.process)) / passed_s).max(0.0)
                };
                // Where others have the rest of the machine, waiting says nothing of this host.
                let counts = if self.cores.is_some() { 0.0 } else { 1.0 };
                let (ran, waited) = (rate(|p| p.ran_s), rate(|p| p.waited_s) * counts);
                let written = last.written_bytes.zip(first.written_bytes);
                let written = written.map_or(0, |(last, first)| last.saturating_sub(first));
                let written_bytes_s = written as f64 / passed_s;
                let vm_means = VmMeans { cpu: ran + waited, waited, written_bytes_s };
                means.vms.insert(vm.clone(), vm_means);
            }
            resident_mib += trail.samples.back().map_or(0, |(_, last)| last.process.resident_mib);
        }
        // Not `sum`, which begins at -0.0.
        let of_vms = |of: fn(&VmMeans) -> f64| means.vms.values().map(of).fold(0.0, |a, b| a + b);
        if let Some((first, last, passed_s)) = ends(&seen.host, over) {
            let busy = ((last.busy_s - first.busy_s) / passed_s).max(0.0);
            means.cpu = match self.cores {
                Some(_) => of_vms(|vm| vm.cpu),
                None => busy + of_vms(|vm| vm.waited),
            };
            let rate = |last: u64, first: u64| last.saturating_sub(first) as f64 / passed_s;
            means.network_bytes_s = (
                rate(last.network_bytes.0, first.network_bytes.0),
                rate(last.network_bytes.1, first.network_bytes.1),
            );
            means.memory_mib = last.available_mib + resident_mib;
            means.pressure = last.pressure;
            means.age = seen.host.back().map(|(at, _)| at.elapsed());
        }
        means
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn push<T>(samples: &mut VecDeque<T>, sample: T) {
    if samples.len() == SAMPLES_MAX {
        samples.pop_front();
    }
    samples.push_back(sample);
}

/// The newest sample, the newest of those that are at least `over` older (or the oldest), and the
/// seconds in between.
fn ends<T: Copy>(samples: &VecDeque<(Instant, T)>, over: Duration) -> Option<(T, T, f64)> {
    let (last_at, last) = samples.back()?;
    let is_old = |(at, _): &&(Instant, T)| last_at.duration_since(*at) >= over;
    let (first_at, first) = samples.iter().rev().find(is_old).or_else(|| samples.front())?;
    let passed_s = last_at.duration_since(*first_at).as_secs_f64();
    (passed_s > 0.0).then_some((*first, *last, passed_s))
}

/// Bytes written to all disks so far (`query-blockstats`).
fn written_bytes(stats: &serde_json::Value) -> Option<u64> {
    stats.as_array()?.iter().map(|disk| disk["stats"]["wr_bytes"].as_u64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(cores: Option<f64>) -> Monitor {
        Monitor::new(Duration::from_secs(15), cores, tempfile::tempdir().unwrap().path())
    }

    fn counters(ran_s: f64, waited_s: f64, written: u64) -> VmCounters {
        let process = ProcessCounters { ran_s, waited_s, resident_mib: 100 };
        VmCounters { process, written_bytes: Some(written) }
    }

    fn host(busy_s: f64) -> Option<HostCounters> {
        let network_bytes = (0, 0);
        Some(HostCounters { busy_s, network_bytes, available_mib: 1000, pressure: None })
    }

    #[test]
    fn means_are_over_the_time_that_is_asked_for() {
        let monitor = monitor(None);
        let start = Instant::now();
        for step in 0..10 {
            // Busy in the last four steps only.
            let busy = f64::from(step.max(5) - 5) * 10.0;
            let vm = ("db1".to_owned(), 7, counters(busy / 2.0, busy / 10.0, step as u64 * 150));
            monitor.take(start + Duration::from_secs(15 * step as u64), host(busy), vec![vm]);
        }
        let near = monitor.means(Duration::from_secs(60));
        assert!((near.vms["db1"].cpu - (20.0 + 4.0) / 60.0).abs() < 1e-9, "{near:?}");
        assert!((near.cpu - (40.0 + 4.0) / 60.0).abs() < 1e-9, "{near:?}");
        assert!((near.vms["db1"].written_bytes_s - 10.0).abs() < 1e-9);
        assert_eq!(near.memory_mib, 1100);
        let far = monitor.means(Duration::from_secs(3600));
        assert!((far.cpu - 44.0 / 135.0).abs() < 1e-9, "{far:?}");
    }

    #[test]
    fn a_vm_that_was_started_anew_has_no_rate_yet() {
        let monitor = monitor(Some(4.0));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let vm = |pid, ran_s| vec![("db1".to_owned(), pid, counters(ran_s, 0.0, 0))];
        monitor.take(at(0), host(0.0), vm(7, 900.0));
        assert_eq!(monitor.means(Duration::from_secs(60)).age, None);
        monitor.take(at(15), host(1.0), vm(8, 1.0));
        let means = monitor.means(Duration::from_secs(60));
        assert!(means.vms.is_empty() && means.age.is_some() && means.cores == 4.0);
        monitor.take(at(30), host(2.0), vm(8, 16.0));
        let means = monitor.means(Duration::from_secs(60));
        assert_eq!((means.vms["db1"].cpu, means.cpu), (1.0, 1.0));
        monitor.take(at(45), host(3.0), vec![]);
        assert!(monitor.means(Duration::from_secs(60)).vms.is_empty());
    }

    #[test]
    fn what_is_kept_has_an_end() {
        let monitor = monitor(None);
        let start = Instant::now();
        for step in 0..500 {
            monitor.take(start + Duration::from_secs(step), host(step as f64), vec![]);
        }
        assert_eq!(monitor.seen().host.len(), SAMPLES_MAX);
    }
}
