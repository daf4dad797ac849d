//! What is known when a site must be emptied: who is there, where they can go, over which paths.
//!
//! Invariant: an evacuation that [`Evacuation::check`] accepts has no index that leads nowhere, no weight,
//! size or rate that is not a finite number, and forecasts for every slot up to its deadline.

use serde::{Deserialize, Serialize};

use super::departure::Departure;
use crate::state::InvalidState;

/// Most slots that are looked ahead, and most streams of one path.
const SLOTS_MAX: usize = 100_000;
const STREAMS_MAX: usize = 16;

/// Everything known at one moment. Sites are numbers, from 0 on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evacuation {
    /// The VMs that should leave.
    pub guests: Vec<Guest>,
    /// Hosts that could take them.
    pub targets: Vec<Target>,
    /// Ways between sites.
    pub paths: Vec<Path>,
    /// When the first slot of every forecast begins.
    pub slots_from_s: i64,
    /// Length of a slot in seconds.
    pub slot_s: u32,
    /// When everyone who is saved must have arrived.
    pub deadline_s: i64,
    /// Longest pause of a guest at the end of its migration, in seconds.
    pub pause_s: f64,
    /// A promised VM is expected to arrive so many seconds before the deadline.
    pub reserve_s: u32,
    /// The plan that this one follows: its promises are kept, and planning takes less time.
    pub previous: Option<Box<Departure>>,
}

/// A VM that should leave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Its name, for people.
    pub name: String,
    /// Its host's name.
    pub host: String,
    /// Its host's site.
    pub site: usize,
    /// What saving it is worth.
    pub weight: f64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk that targets do not have, in MiB.
    pub disk_mib: u64,
    /// CPU that it asks for, in the unit of the targets.
    pub cpu: f64,
    /// Memory and disk that it changes, in MiB a second: one number, or one for each slot.
    pub dirty_mib_s: Vec<f64>,
    /// The same by a cautious forecast, which promises rest on; empty if there is none.
    pub dirty_high_mib_s: Vec<f64>,
    /// Never moves.
    pub is_pinned: bool,
    /// Where it is going, if it is being sent now.
    pub under_way: Option<UnderWay>,
}

/// A migration that runs. It begins anew if its VM does not go on at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnderWay {
    /// Index of its path.
    pub path: usize,
    /// Index of its target.
    pub target: usize,
    /// MiB that the target has, without what changed since.
    pub sent_mib: f64,
}

/// A host that could take VMs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Its name, for people.
    pub name: String,
    /// Its site.
    pub site: usize,
    /// Memory for VMs that have not arrived, those under way included, in MiB.
    pub memory_mib: u64,
    /// CPU for them.
    pub cpu: f64,
}

/// A way from one site to another, which nothing planned here shares with another path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Path {
    /// Its name, for people.
    pub name: String,
    /// The site that it leaves.
    pub from: usize,
    /// The site that it leads to.
    pub to: usize,
    /// Expected for migrations, in MiB a second, for each slot.
    pub leftover_mib_s: Vec<f64>,
    /// The same by a cautious quantile; empty if there is none.
    pub cautious_mib_s: Vec<f64>,
    /// How many migrations are needed to fill it; 1 unless measured.
    pub streams: usize,
}

impl Evacuation {
    /// Whether it can be planned at all.
    pub(super) fn check(&self, now_s: i64) -> Result<(), InvalidState> {
        let wrong = InvalidState::Evacuation;
        if self.slot_s == 0 {
            return Err(wrong("slots must be longer than nothing"));
        }
        if !(self.pause_s.is_finite() && self.pause_s >= 0.0) {
            return Err(wrong("pause must be a number, zero or more"));
        }
        // 2^40 s are 35,000 years; beyond that differences need not fit.
        if [now_s, self.slots_from_s, self.deadline_s].iter().any(|at| at.unsigned_abs() > 1 << 40)
        {
            return Err(wrong("times must be within 2^40 seconds of 1970"));
        }
        if now_s < self.slots_from_s {
            return Err(wrong("slots must begin now or before"));
        }
        let slots = self.slots()?;
        for path in &self.paths {
            rates(&path.leftover_mib_s, "the leftover", &path.name)?;
            rates(&path.cautious_mib_s, "the cautious leftover", &path.name)?;
            let cautious = path.cautious_mib_s.len();
            if path.leftover_mib_s.len() < slots || (cautious != 0 && cautious < slots) {
                return Err(wrong("forecasts must reach its deadline on every path"));
            }
            if path.streams == 0 || path.streams > STREAMS_MAX {
                return Err(wrong("paths must have 1 to 16 streams"));
            }
        }
        for target in &self.targets {
            rates(&[target.cpu], "the free CPU", &target.name)?;
        }
        for guest in &self.guests {
            self.check_guest(guest, slots)?;
        }
        for mut names in [
            self.guests.iter().map(|guest| &*guest.name).collect::<Vec<_>>(),
            self.targets.iter().map(|target| &*target.name).collect(),
            self.paths.iter().map(|path| &*path.name).collect(),
        ] {
            names.sort_unstable();
            if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(InvalidState::SameName(twice[0].to_owned()));
            }
        }
        Ok(())
    }

    fn check_guest(&self, guest: &Guest, slots: usize) -> Result<(), InvalidState> {
        let wrong = InvalidState::Evacuation;
        let name = || guest.name.clone();
        if !(guest.weight.is_finite() && guest.weight > 0.0) {
            return Err(InvalidState::NotPositive { what: "the weight", name: name() });
        }
        if guest.memory_mib.saturating_add(guest.disk_mib) == 0 {
            return Err(InvalidState::NotPositive { what: "memory and disk", name: name() });
        }
        rates(&[guest.cpu], "the CPU", &guest.name)?;
        rates(&guest.dirty_mib_s, "the rate of change", &guest.name)?;
        rates(&guest.dirty_high_mib_s, "the cautious rate of change", &guest.name)?;
        let (dirty, high) = (guest.dirty_mib_s.len(), guest.dirty_high_mib_s.len());
        if dirty == 0 || (dirty != 1 && dirty < slots) || (high > 1 && high < slots) {
            return Err(wrong("rates of change must be one number or reach its deadline"));
        }
        if let Some(UnderWay { path, target, sent_mib }) = &guest.under_way {
            rates(&[*sent_mib], "what was sent", &guest.name)?;
            let (Some(path), Some(target)) = (self.paths.get(*path), self.targets.get(*target))
            else {
                return Err(wrong(
                    "VMs under way must be on one of its paths to one of its targets",
                ));
            };
            if path.from != guest.site || path.to != target.site {
                return Err(wrong(
                    "VMs under way must be on a path from their site to their target",
                ));
            }
        }
        Ok(())
    }

    /// Slots up to the deadline; none if it is before the first one.
    fn slots(&self) -> Result<usize, InvalidState> {
        let span = self.deadline_s.saturating_sub(self.slots_from_s).max(0);
        let slots = span.unsigned_abs().div_ceil(u64::from(self.slot_s));
        usize::try_from(slots)
            .ok()
            .filter(|slots| *slots <= SLOTS_MAX)
            .ok_or(InvalidState::Evacuation("deadline must be within 100,000 slots"))
    }
}

fn rates(values: &[f64], what: &'static str, name: &str) -> Result<(), InvalidState> {
    if values.iter().all(|value| value.is_finite() && *value >= 0.0) {
        return Ok(());
    }
    Err(InvalidState::NoRate { what, name: name.to_owned() })
}
