//! What a planner must not forget: its wishes, its orders, and what it has learned of each series.
//!
//! Invariant: all of it is one document behind [`Store`], replaced as a whole, so what is read back was
//! true at one moment. Losing it moves nothing and stops nothing: hosts and VMs are seen again, orders
//! under way go on at the agents that carry them out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;

use longhaul_scheduler::forecast::Forecaster;
use serde::{Deserialize, Serialize};

use crate::agent::durable;
use crate::control::{JobKind, OrderOutcome};

/// Samples of each host: as many as the planner ever looks at, and some to show.
const SAMPLES_MAX: usize = 24;
/// Orders that are remembered.
const ORDERS_MAX: usize = 200;
/// Moves that are remembered: the planner's longest wait is far shorter.
const MOVED_MAX: usize = 10_000;
/// A VM that was not seen for so long is forgotten.
const FORGET_S: i64 = 7 * 24 * 3600;

/// Where the document lies. A file here; a cluster's store could be another.
pub(super) trait Store: Send + Sync {
    /// What was saved last, if anything was.
    fn load(&self) -> io::Result<Option<Vec<u8>>>;
    /// Replaces it, durably.
    fn save(&self, document: &[u8]) -> io::Result<()>;
}

/// A file in the state folder.
pub(super) struct FileStore(pub(super) PathBuf);

impl Store for FileStore {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        durable::read(&self.0)
    }

    fn save(&self, document: &[u8]) -> io::Result<()> {
        durable::write(&self.0, document)
    }
}

/// The document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Memory {
    /// Hosts that are to be emptied.
    #[serde(default)]
    pub(super) maintenance: BTreeSet<String>,
    /// What was asked of each host, oldest first.
    #[serde(default)]
    pub(super) hosts: BTreeMap<String, VecDeque<f64>>,
    /// What was learned of each VM.
    #[serde(default)]
    pub(super) vms: BTreeMap<String, Known>,
    /// Moves, whoever made them, oldest first.
    #[serde(default)]
    pub(super) moved: VecDeque<PastMove>,
    /// Orders, oldest first.
    #[serde(default)]
    pub(super) orders: VecDeque<Order>,
    /// The evacuation under way.
    #[serde(default)]
    pub(super) evacuation: Option<Wish>,
}

/// One VM's series, and where it was last seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) host: String,
    pub(super) seen_s: i64,
    pub(super) series: Forecaster,
}

/// A move that was seen or ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PastMove {
    pub(super) vm: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) at_s: i64,
}

/// A move that some agent was told to make.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) vm: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) at: jiff::Timestamp,
    pub(super) because: String,
    /// What it was thought to send.
    pub(super) mib: u64,
    /// What the VM held, memory and disks.
    pub(super) whole_mib: u64,
    pub(super) seconds: f64,
    /// The job's number at the host that it leaves, once it is known.
    pub(super) job: Option<u64>,
    /// The highest number that a job of that host had before: one of this VM beyond it is this order's,
    /// though the answer was lost.
    #[serde(default)]
    pub(super) beyond: u64,
    pub(super) outcome: OrderOutcome,
}

/// An evacuation that is to be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wish {
    pub(super) site: String,
    pub(super) to: String,
    pub(super) deadline: jiff::Timestamp,
    /// VMs of the site when it began.
    pub(super) guests: Vec<String>,
    /// Those that were promised then, in order.
    pub(super) promised: Vec<String>,
    /// Nothing more is done.
    pub(super) is_over: bool,
}

impl Order {
    /// Whether nobody has said yet how it ended.
    pub(super) fn is_under_way(&self) -> bool {
        self.outcome == OrderOutcome::UnderWay
    }

    /// Whether a job of the host that it leaves is this order's.
    pub(super) fn is_job(&self, id: u64, kind: JobKind, vm: &str) -> bool {
        match self.job {
            Some(job) => job == id,
            None => id > self.beyond && kind == JobKind::Migrate && vm == self.vm,
        }
    }

    /// Whether it concerns the host.
    pub(super) fn touches(&self, host: &str) -> bool {
        self.from == host || self.to == host
    }
}

impl Memory {
    /// Takes the next sample of a host.
    pub(super) fn observe_host(&mut self, host: &str, cpu: f64) {
        let samples = self.hosts.entry(host.to_owned()).or_default();
        if samples.len() == SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back(cpu);
    }

    /// Takes the next sample of a VM. One that is elsewhere than before has been moved.
    pub(super) fn observe_vm(&mut self, vm: &str, host: &str, now_s: i64, cpu: Option<f64>) {
        let fresh =
            || Known { host: host.to_owned(), seen_s: now_s, series: Forecaster::default() };
        let known = self.vms.entry(vm.to_owned()).or_insert_with(fresh);
        if let Some(cpu) = cpu {
            known.series.observe(now_s, cpu);
        }
        known.seen_s = now_s;
        if known.host != host {
            let from = std::mem::replace(&mut known.host, host.to_owned());
            let last = self.moved.iter().rev().find(|past| past.vm == vm);
            if !last.is_some_and(|past| past.from == from && past.to == host) {
                tracing::info!(vm, from, to = host, "a VM was moved by somebody else");
                self.note_move(PastMove { vm: vm.into(), from, to: host.into(), at_s: now_s });
            }
        }
    }

    /// Notes a move.
    pub(super) fn note_move(&mut self, past: PastMove) {
        if self.moved.len() == MOVED_MAX {
            self.moved.pop_front();
        }
        self.moved.push_back(past);
    }

    /// Notes an order.
    pub(super) fn note_order(&mut self, order: Order) {
        if self.orders.len() == ORDERS_MAX {
            self.orders.pop_front();
        }
        self.orders.push_back(order);
    }

    /// Forgets what was not seen for long.
    pub(super) fn forget(&mut self, now_s: i64) {
        self.vms.retain(|_, known| now_s.saturating_sub(known.seen_s) < FORGET_S);
        self.moved.retain(|past| now_s.saturating_sub(past.at_s) < FORGET_S);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_back_to_the_last_bit() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore(dir.path().join("scheduler.json"));
        assert!(store.load().unwrap().is_none());
        let mut memory = Memory::default();
        memory.maintenance.insert("lyon".into());
        for step in 0..50 {
            memory.observe_host("paris", f64::from(step) / 3.0);
            memory.observe_vm("db1", "paris", i64::from(step) * 300, Some(f64::from(step) / 7.0));
        }
        store.save(&serde_json::to_vec(&memory).unwrap()).unwrap();
        let back: Memory = serde_json::from_slice(&store.load().unwrap().unwrap()).unwrap();
        assert_eq!(back, memory);
        assert_eq!(back.hosts["paris"].len(), SAMPLES_MAX);
    }

    #[test]
    fn moves_by_hand_are_seen_and_ours_are_not_taken_for_them() {
        let mut memory = Memory::default();
        memory.observe_vm("db1", "paris", 0, None);
        memory.observe_vm("db1", "lyon", 300, None);
        assert_eq!(memory.moved.len(), 1);
        let (vm, from, to) = ("db1".to_owned(), "lyon".to_owned(), "paris".to_owned());
        memory.note_move(PastMove { vm, from, to, at_s: 400 });
        memory.observe_vm("db1", "paris", 600, None);
        assert_eq!(memory.moved.len(), 2);
        memory.observe_vm("db1", "lyon", 900, None);
        assert_eq!(memory.moved.len(), 3);
        memory.forget(900 + FORGET_S);
        assert!(memory.moved.is_empty() && memory.vms.is_empty());
    }
}
