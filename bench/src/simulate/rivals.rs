//! The rivals' rules: when a host is overloaded, which VM leaves, where it goes, whom to empty.
//!
//! Invariant: pure; the same view gives the same moves. Rules are those of the released code of
//! CloudSim 3.0.3, not of the paper where the two differ: LR fits a plain line (its weights apply only
//! when 40 % of them are zero, which never happens), and a VM that was just placed may be placed a
//! second time in the same round.

use std::collections::BTreeSet;

use super::machine::{HostType, Shares, Stay, share};

/// Samples of a VM's own use that a rule sees, newest first.
pub(super) const HISTORY: usize = 30;
/// Samples that LR fits its line through.
const FITTED: usize = 10;
/// THR's threshold for hosts that LR has too few samples of.
const FALLBACK: f64 = 0.7;

/// When a host counts as overloaded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Overload {
    /// THR: more than this share of its MIPS is asked for.
    Threshold(f64),
    /// LR: the line through the last 10 samples, prolonged to when a migration would have ended, times
    /// this factor reaches 1.
    Regression(f64),
}

/// What the rules see of a VM.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct VmView {
    /// MIPS that it asks for now.
    pub(super) asked: f64,
    /// Its size in MIPS.
    pub(super) mips: f64,
    /// MiB that a migration moves.
    pub(super) memory_mib: u64,
    /// Its use as a share of its size, newest first, [`HISTORY`] samples at most.
    pub(super) history: Vec<f64>,
}

/// What the rules see of a host.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HostView {
    /// Its type.
    pub(super) host: HostType,
    /// VMs on it, in the order in which they came.
    pub(super) vms: Vec<usize>,
    /// Share of its MIPS in use when it was last looked at.
    pub(super) used: f64,
}

/// One VM's way to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) vm: usize,
    pub(super) to: usize,
}

/// A host in the middle of planning: with the VMs that the plan has put there or taken away.
#[derive(Debug, Clone)]
struct Trial {
    host: HostType,
    vms: Vec<usize>,
    used: f64,
    /// MIPS asked for by all its VMs, added in their order.
    asked: f64,
    shares: Shares,
    given: f64,
    /// Sum of the VMs' histories in shares of this host, newest first.
    history: Vec<f64>,
}

impl Trial {
    fn new(view: &HostView, vms: &[VmView]) -> Self {
        let mut trial = Self {
            host: view.host,
            vms: view.vms.clone(),
            used: view.used,
            asked: 0.0,
            shares: Shares::default(),
            given: 0.0,
            history: Vec::new(),
        };
        trial.refresh(vms);
        trial
    }

    /// Works out everything that follows from which VMs are there.
    fn refresh(&mut self, vms: &[VmView]) {
        let asked: Vec<_> = self.vms.iter().map(|&vm| (vms[vm].asked, Stay::Settled)).collect();
        self.asked = asked.iter().map(|(asked, _)| asked).sum();
        self.shares = share(self.host, &asked);
        self.given = self.shares.given.iter().sum();
        self.history = vec![0.0; HISTORY];
        for &vm in &self.vms {
            add_history(&mut self.history, &vms[vm], self.host);
        }
    }

    fn is_suitable(&self, vm: &VmView) -> bool {
        self.host.core_mips() >= vm.asked && self.shares.free >= vm.asked
    }

    /// More watts than now if the VM came.
    fn watts_more(&self, vm: &VmView) -> f64 {
        let then = (self.given + vm.asked) / self.host.mips();
        self.host.power_w(then) - self.host.power_w(self.used)
    }
}

fn add_history(sum: &mut [f64], vm: &VmView, host: HostType) {
    for (sum, used) in sum.iter_mut().zip(&vm.history) {
        *sum += used * vm.mips / host.mips();
    }
}

impl Overload {
    /// Whether the host is overloaded, with `more` on it if given.
    fn holds(self, host: &Trial, more: Option<&VmView>) -> bool {
        let asked = more.map_or(host.asked, |vm| host.asked + vm.asked) / host.host.mips();
        match self {
            Self::Threshold(limit) => asked > limit,
            Self::Regression(safety) => {
                let mut history = [0.0; HISTORY];
                history.copy_from_slice(&host.history);
                if let Some(vm) = more {
                    add_history(&mut history, vm, host.host);
                }
                if history[FITTED - 1..].iter().all(|used| *used == 0.0) {
                    return asked > FALLBACK;
                }
                // A migration ends within the next interval, whatever the VM: 28 s of 300 s.
                prolonged(&history[..FITTED], FITTED as f64 + 1.0) * safety >= 1.0
            }
        }
    }
}

/// The least-squares line through samples, newest first and oldest at 1, at `x`.
fn prolonged(newest_first: &[f64], x: f64) -> f64 {
    let n = newest_first.len() as f64;
    let mean_x = f64::midpoint(n, 1.0);
    let mean_y = newest_first.iter().sum::<f64>() / n;
    let (mut sxy, mut sxx) = (0.0, 0.0);
    for (at, y) in (1..).map(f64::from).zip(newest_first.iter().rev()) {
        sxy += (at - mean_x) * (y - mean_y);
        sxx += (at - mean_x) * (at - mean_x);
    }
    mean_y + sxy / sxx * (x - mean_x)
}

/// The rivals' plan of one round: VMs that leave overloaded hosts, then hosts that are emptied.
///
/// VMs leave an overloaded host by least memory until it is none any more (MMT). Each goes, by falling
/// use, to the host whose power rises least and that would not be overloaded (PABFD). Then the least
/// used host is emptied if all its VMs find a place, and so on over all hosts.
pub(super) fn plan(overload: Overload, hosts: &[HostView], vms: &[VmView]) -> Vec<Move> {
    let mut trials: Vec<_> = hosts.iter().map(|host| Trial::new(host, vms)).collect();
    let numbers = 0..trials.len();
    let over: BTreeSet<usize> =
        numbers.clone().filter(|&host| overload.holds(&trials[host], None)).collect();

    let mut leaving = Vec::new();
    for &host in &over {
        let trial = &mut trials[host];
        while let Some(at) = least_memory(&trial.vms, vms) {
            leaving.push(trial.vms.remove(at));
            trial.refresh(vms);
            if !overload.holds(trial, None) {
                break;
            }
        }
    }
    let mut moves = Vec::new();
    for vm in by_falling_use(leaving, vms) {
        if let Some(to) = place(overload, &trials, &vms[vm], &over) {
            trials[to].vms.push(vm);
            trials[to].refresh(vms);
            moves.push(Move { vm, to });
        }
    }

    let off = numbers.filter(|&host| trials[host].used == 0.0);
    let mut no_target: BTreeSet<usize> = over.iter().copied().chain(off).collect();
    let mut not_emptied = no_target.clone();
    while let Some(host) = least_used(&trials, &not_emptied) {
        not_emptied.insert(host);
        no_target.insert(host);
        let emptied = empty(overload, &mut trials, vms, host, &no_target);
        not_emptied.extend(emptied.iter().map(|one| one.to));
        moves.extend(emptied);
    }
    moves
}

/// Moves all VMs of a host, or none.
fn empty(
    overload: Overload,
    trials: &mut [Trial],
    vms: &[VmView],
    host: usize,
    no_target: &BTreeSet<usize>,
) -> Vec<Move> {
    let mut moves: Vec<Move> = Vec::new();
    for vm in by_falling_use(trials[host].vms.clone(), vms) {
        let Some(to) = place(overload, trials, &vms[vm], no_target) else {
            for Move { vm, to } in moves {
                trials[to].vms.retain(|other| *other != vm);
                trials[to].refresh(vms);
            }
            return Vec::new();
        };
        trials[to].vms.push(vm);
        trials[to].refresh(vms);
        moves.push(Move { vm, to });
    }
    moves
}

fn least_memory(of: &[usize], vms: &[VmView]) -> Option<usize> {
    (0..of.len()).min_by_key(|&at| vms[of[at]].memory_mib)
}

fn by_falling_use(mut of: Vec<usize>, vms: &[VmView]) -> Vec<usize> {
    of.sort_by(|a, b| vms[*b].asked.total_cmp(&vms[*a].asked));
    of
}

fn least_used(trials: &[Trial], excluded: &BTreeSet<usize>) -> Option<usize> {
    let candidates = (0..trials.len()).filter(|host| !excluded.contains(host));
    candidates
        .filter(|&host| trials[host].used > 0.0 && trials[host].used < 1.0)
        .filter(|&host| !trials[host].vms.is_empty())
        .min_by(|a, b| trials[*a].used.total_cmp(&trials[*b].used))
}

/// The host whose power rises least; of equals the first.
fn place(
    overload: Overload,
    trials: &[Trial],
    vm: &VmView,
    excluded: &BTreeSet<usize>,
) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (host, trial) in trials.iter().enumerate() {
        if excluded.contains(&host) || !trial.is_suitable(vm) {
            continue;
        }
        let watts = trial.watts_more(vm);
        if best.is_some_and(|(least, _)| watts >= least) {
            continue;
        }
        // An idle host takes any VM, or one that is larger than the rule allows would find none.
        if trial.given != 0.0 && overload.holds(trial, Some(vm)) {
            continue;
        }
        best = Some((watts, host));
    }
    best.map(|(_, host)| host)
}

/// Where each VM starts: in the order of their numbers, by their full size, by the same rule.
///
/// Nothing runs yet, so a host's power now is that of an idle one, and it is overloaded only by the VM
/// that is being placed.
///
/// # Errors
///
/// The number of the first VM that fits nowhere.
pub(super) fn first_placement(
    overload: Overload,
    hosts: usize,
    host_memory_mib: u64,
    vms: &[VmView],
) -> Result<Vec<usize>, usize> {
    let mut taken = vec![(0.0, 0); hosts];
    let mut placed = Vec::with_capacity(vms.len());
    for (number, vm) in vms.iter().enumerate() {
        let limit = match overload {
            Overload::Threshold(limit) => limit,
            Overload::Regression(_) => FALLBACK,
        };
        let fits = |&(host, &(mips, mib)): &(usize, &(f64, u64))| {
            let kind = HostType::of(host);
            kind.core_mips() >= vm.mips
                && kind.mips() - mips >= vm.mips
                && mib + vm.memory_mib <= host_memory_mib
                && (mips == 0.0 || vm.mips / kind.mips() <= limit)
        };
        let watts = |(host, &(mips, _)): (usize, &(f64, u64))| {
            let kind = HostType::of(host);
            kind.power_w((mips + vm.mips) / kind.mips()) - kind.power_w(0.0)
        };
        let (host, _) = taken
            .iter()
            .enumerate()
            .filter(fits)
            .min_by(|a, b| watts(*a).total_cmp(&watts(*b)))
            .ok_or(number)?;
        taken[host].0 += vm.mips;
        taken[host].1 += vm.memory_mib;
        placed.push(host);
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_prolonged() {
        let rising: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        assert!((prolonged(&rising, 11.0) - 11.0).abs() < 1e-9);
    }

    fn vm(asked: f64, memory_mib: u64) -> VmView {
        VmView { asked, mips: 2500.0, memory_mib, history: Vec::new() }
    }

    fn host(number: usize, vms: &[usize], used: f64) -> HostView {
        HostView { host: HostType::of(number), vms: vms.to_vec(), used }
    }

    #[test]
    fn the_vm_of_least_memory_leaves_an_overloaded_host() {
        let vms = [vm(1800.0, 1740), vm(1500.0, 870)];
        let hosts = [host(0, &[0, 1], 0.88), host(1, &[], 0.0)];
        let moves = plan(Overload::Threshold(0.8), &hosts, &vms);
        assert_eq!(moves, [Move { vm: 1, to: 1 }]);
    }

    #[test]
    fn a_host_is_emptied_whole_or_not_at_all() {
        let vms = [vm(100.0, 870), vm(1000.0, 870), vm(1000.0, 870)];
        let some = [host(0, &[0], 0.03), host(2, &[1, 2], 0.54)];
        assert_eq!(plan(Overload::Threshold(0.8), &some, &vms), [Move { vm: 0, to: 1 }]);
        let vms = [vm(900.0, 870), vm(1100.0, 870), vm(1000.0, 870), vm(1000.0, 870)];
        let none = [host(0, &[0, 1], 0.5), host(2, &[2, 3], 0.54)];
        assert_eq!(plan(Overload::Threshold(0.8), &none, &vms), []);
    }
}
