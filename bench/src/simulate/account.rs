//! What a simulated day cost, by CloudSim's own definitions (its examples' `Helper`, 3.0.3).
//!
//! Invariant: a state counts from its entry to the next entry at a later time; an entry at the same
//! time replaces it, so what lasted no time costs nothing.

/// A host's or VM's state from some time on.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    at_s: f64,
    given: f64,
    asked: f64,
    flag: bool,
}

/// The time of one host: how long it was active, and how long of that it gave less than was asked.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct HostAccount {
    last: Option<Entry>,
    /// Whether the entry before `last` was active; before the first one a host counts as active.
    was_idle_before: bool,
    active_s: f64,
    short_s: f64,
    sleeps: u64,
}

impl HostAccount {
    /// The host gives `given` of the `asked` MIPS from `at_s` on.
    pub(super) fn enter(&mut self, at_s: f64, given: f64, asked: f64) {
        if let Some(last) = self.last.filter(|last| last.at_s != at_s) {
            if last.flag {
                self.active_s += at_s - last.at_s;
                if last.given < last.asked {
                    self.short_s += at_s - last.at_s;
                }
            }
            self.close(last);
        }
        self.last = Some(Entry { at_s, given, asked, flag: given > 0.0 });
    }

    fn close(&mut self, last: Entry) {
        if !last.flag && !self.was_idle_before {
            self.sleeps += 1;
        }
        self.was_idle_before = !last.flag;
    }
}

/// What one VM asked for and got, in MIPS times seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct VmAccount {
    last: Option<Entry>,
    asked: f64,
    given: f64,
    short_in_migration: f64,
}

impl VmAccount {
    /// The VM gets `given` of the `asked` MIPS from `at_s` on.
    pub(super) fn enter(&mut self, at_s: f64, given: f64, asked: f64, is_migrating: bool) {
        if let Some(last) = self.last.filter(|last| last.at_s != at_s) {
            let span_s = at_s - last.at_s;
            self.asked += last.asked * span_s;
            self.given += last.given * span_s;
            if last.given < last.asked && last.flag {
                self.short_in_migration += (last.asked - last.given) * span_s;
            }
        }
        self.last = Some(Entry { at_s, given, asked, flag: is_migrating });
    }
}

/// The figures of one simulated day.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    /// Energy of all hosts in kWh.
    pub energy_kwh: f64,
    /// Migrations started.
    pub migrations: u64,
    /// MiB of memory that they moved.
    pub moved_mib: u64,
    /// SLATAH: share of the hosts' active time in which they gave less CPU than was asked.
    pub slatah: f64,
    /// PDM: share of the asked CPU that was not given to VMs while they migrated.
    pub pdm: f64,
    /// Share of the asked CPU that was not given, migrating or not.
    pub unmet: f64,
    /// Times that a host fell idle.
    pub sleeps: u64,
}

/// Sums the accounts of all hosts and VMs.
pub(super) fn outcome<'a>(
    energy_ws: f64,
    migrations: u64,
    moved_mib: u64,
    hosts: impl Iterator<Item = &'a HostAccount>,
    vms: impl Iterator<Item = &'a VmAccount>,
) -> Outcome {
    let (mut active_s, mut short_s, mut sleeps) = (0.0, 0.0, 0);
    for host in hosts {
        active_s += host.active_s;
        short_s += host.short_s;
        let sleeps_now = host.last.is_some_and(|last| !last.flag && !host.was_idle_before);
        sleeps += host.sleeps + u64::from(sleeps_now);
    }
    let (mut asked, mut given, mut short) = (0.0, 0.0, 0.0);
    for vm in vms {
        asked += vm.asked;
        given += vm.given;
        short += vm.short_in_migration;
    }
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    Outcome {
        energy_kwh: energy_ws / 3.6e6,
        migrations,
        moved_mib,
        slatah: share(short_s, active_s),
        pdm: share(short, asked),
        unmet: share(asked - given, asked),
        sleeps,
    }
}
