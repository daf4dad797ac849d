//! What is known when a plan is made: hosts, VMs, and what moved before.
//!
//! Invariant: CPU is in one unit throughout (cores, MHz, MIPS: the caller's choice), and what is asked
//! may exceed what a host has; that is what overload means. A state that [`State::check`] accepts has
//! no index that leads nowhere and no size that is not a finite number above zero.

use serde::{Deserialize, Serialize};

/// Everything known at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// All hosts, on or off.
    pub hosts: Vec<Host>,
    /// All VMs that run.
    pub vms: Vec<Vm>,
    /// What moved lately, whoever moved it: at least as far back as the policy's longest wait.
    pub moved: Vec<Moved>,
    /// What one migration gets of the network, in MiB a second.
    pub migration_mib_s: f64,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Its name, for people.
    pub name: String,
    /// All its CPU.
    pub cpu: f64,
    /// The most of it that one VM gets.
    pub cpu_per_vm: f64,
    /// Memory for VMs in MiB.
    pub memory_mib: u64,
    /// Watts when idle and when full.
    pub watts: (f64, f64),
    /// Off hosts are switched on only to consolidate.
    pub is_on: bool,
    /// Is to be emptied and takes no VM.
    pub is_in_maintenance: bool,
    /// Has a VM that was not watched for long enough: it is too early to judge the host.
    #[serde(default)]
    pub is_settling: bool,
    /// When the last of `asked` was taken.
    pub sampled_at_s: i64,
    /// CPU asked for, oldest first, one sample each interval; a few are enough.
    pub asked: Vec<f64>,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Its name, for people.
    pub name: String,
    /// Index of the host that it runs on.
    pub host: usize,
    /// CPU that it asks for now.
    pub asked: f64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// MiB that moving it sends: memory, and disk that the target does not have.
    pub move_mib: u64,
    /// Never moves.
    pub is_pinned: bool,
    /// Is on its way already.
    pub is_migrating: bool,
    /// VMs of the same group share a host.
    pub together: Option<String>,
    /// VMs of the same group never share a host.
    pub apart: Option<String>,
}

/// A migration that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The VM's name.
    pub vm: String,
    /// Index of the host that it left.
    pub from: usize,
    /// Index of the host that it went to.
    pub to: usize,
    /// When it started.
    pub at_s: i64,
}

/// Why no plan can be made of a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidState {
    /// A VM's host is not among the hosts.
    #[error("VM {vm} is said to run on host number {host}, and there are {hosts} hosts")]
    NoSuchHost {
        /// The VM's name.
        vm: String,
        /// The index.
        host: usize,
        /// How many hosts there are.
        hosts: usize,
    },
    /// Two hosts or two VMs have one name.
    #[error("the name {0} is given twice; a decision could mean either")]
    SameName(String),
    /// A size or rate that is no number above zero.
    #[error("{what} of {name} must be a number above zero")]
    NotPositive {
        /// Which number.
        what: &'static str,
        /// Whose.
        name: String,
    },
    /// A size or rate that is no number, or below zero.
    #[error("{what} of {name} must be a number, zero or more")]
    NoRate {
        /// Which number.
        what: &'static str,
        /// Whose.
        name: String,
    },
    /// An evacuation contradicts itself.
    #[error("the evacuation's {0}")]
    Evacuation(&'static str),
    /// What is known of a VM's data and its way contradicts itself.
    #[error("the crossing's {0}")]
    Crossing(&'static str),
    /// The policy contradicts itself.
    #[error("the policy's {0}")]
    Policy(&'static str),
    /// Not one forecast for each VM.
    #[error("{forecasts} forecasts for {vms} VMs")]
    Forecasts {
        /// VMs in the state.
        vms: usize,
        /// Forecasts given.
        forecasts: usize,
    },
}

impl State {
    /// Whether a plan can be made of it at all.
    pub(crate) fn check(&self) -> Result<(), InvalidState> {
        let positive = |value: f64, what: &'static str, name: &str| {
            let is_fine = value.is_finite() && value > 0.0;
            let error = InvalidState::NotPositive { what, name: name.to_owned() };
            if is_fine { Ok(()) } else { Err(error) }
        };
        positive(self.migration_mib_s, "the migration rate", "the network")?;
        for host in &self.hosts {
            positive(host.cpu, "the CPU", &host.name)?;
            positive(host.cpu_per_vm, "the CPU for one VM", &host.name)?;
            positive(host.watts.0, "the idle power", &host.name)?;
            positive(host.watts.1, "the full power", &host.name)?;
        }
        for vm in &self.vms {
            positive(vm.move_mib as f64, "what a move sends", &vm.name)?;
            if vm.host >= self.hosts.len() {
                let hosts = self.hosts.len();
                return Err(InvalidState::NoSuchHost { vm: vm.name.clone(), host: vm.host, hosts });
            }
        }
        for names in [
            self.hosts.iter().map(|host| &*host.name).collect::<Vec<_>>(),
            self.vms.iter().map(|vm| &*vm.name).collect(),
        ] {
            let mut sorted = names;
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(InvalidState::SameName(twice[0].to_owned()));
            }
        }
        Ok(())
    }
}
