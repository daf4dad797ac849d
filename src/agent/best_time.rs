//! When a VM that waits should go: the hour in which least of it crosses twice, and in time.
//!
//! Invariant: what is not known makes nobody wait. A VM that was not seen for a day goes at once; a link that
//! was not seen is taken for as free as its operator says it is.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use longhaul_scheduler::courses;
use longhaul_scheduler::timing::{Advice, Course, Crossing, advise};
use longhaul_transport::BitRate;

use super::answer::Desk;
use super::load::disk_mib;
use super::monitor::{PER_DAY, SLOT_S};
use super::scheduling::{DIRTY_MIB_S, PAUSE_S};
use crate::calendar::{RateCalendar, Windows};
use crate::units::MIB;

/// Share of a link that is always thought to be left.
const LEFT_MIN: f64 = 0.05;
/// What an hour earlier is worth, as a share of all data.
const HASTE: f64 = 0.0005;
/// Longest time that is looked ahead; a later deadline is taken for this. Being asked costs some ms then.
const AHEAD_S_MAX: i64 = 2 * 24 * 60 * 60;

/// What bounds the choice.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds<'a> {
    pub(super) vm: &'a str,
    pub(super) to: &'a str,
    pub(super) windows: &'a Windows,
    pub(super) rate: Option<&'a RateCalendar>,
    pub(super) deadline: Timestamp,
    /// The disks are at the peer but for what changes.
    pub(super) seeded: bool,
}

impl Desk {
    /// Whether the VM should go now, and when else; nothing if too little is known of it to say.
    pub(super) fn best_time(
        &self,
        bounds: &Bounds<'_>,
        zone: &TimeZone,
        now: Timestamp,
    ) -> Option<Advice> {
        let now_s = now.as_second();
        let slot_from_s = now_s.div_euclid(SLOT_S) * SLOT_S;
        let deadline_s = bounds.deadline.as_second().min(now_s + AHEAD_S_MAX);
        let ahead_s = (deadline_s - slot_from_s).max(0).unsigned_abs();
        let slots = usize::try_from(ahead_s.div_ceil(SLOT_S.unsigned_abs())).ok()?;
        let seen = self.monitor.history(bounds.vm, now_s)?;
        let dirty: Vec<f64> = seen
            .iter()
            .map(|[cores, written]| f64::from(*cores) * DIRTY_MIB_S.0 + f64::from(*written))
            .collect();
        let days = courses::like_now(&dirty, PER_DAY, slots);
        if days.is_empty() {
            return None;
        }
        let vm = self.registry.book().get(bounds.vm)?.vm;
        let disk_mib = if bounds.seeded { 0 } else { disk_mib(&vm, self.registry.policy()) };
        let whole_mib = (vm.memory_mib + disk_mib) as f64;
        let at_s = |slot: usize| slot_from_s + slot as i64 * SLOT_S;
        let slots_s: Vec<i64> = (0..slots).map(|slot| at_s(slot).max(now_s)).collect();
        let link_mib_s = self.left_mib_s(bounds, zone, &slots_s);
        let course = |dirty_mib_s| Course { link_mib_s: link_mib_s.clone(), dirty_mib_s };
        let crossing = Crossing {
            name: bounds.vm.to_owned(),
            whole_mib,
            left_mib: whole_mib,
            courses: days.into_iter().map(course).collect(),
            price: prices(bounds.windows, zone, &slots_s),
            slots_from_s: slot_from_s,
            slot_s: SLOT_S as u32,
            deadline_s,
            pause_s: PAUSE_S,
            haste: HASTE,
            in_parts: false,
            has_begun: false,
        };
        advise(&crossing, now_s)
            .inspect_err(|error| tracing::warn!(vm = bounds.vm, %error, "no best time"))
            .ok()
    }

    /// What is expected to be left of the way to the peer at each of these times, in MiB a second.
    fn left_mib_s(&self, bounds: &Bounds<'_>, zone: &TimeZone, slots_s: &[i64]) -> Vec<f64> {
        let mib_s = |rate: BitRate| rate.bits_per_second() as f64 / 8.0 / MIB;
        let links = self.links.all().into_iter().filter(|link| link.peer == bounds.to);
        let carried = links.filter_map(|link| link.path).map(|path| path.bandwidth as f64 / MIB);
        let link = carried.fold(mib_s(self.config.scheduler.link), f64::max);
        let first_s = slots_s.first().copied().unwrap_or(0);
        let others = self.monitor.uplink(first_s, slots_s.len());
        let left = |(slot, at_s): (usize, &i64)| {
            let others = others.get(slot).map_or(0.0, |outlook| outlook.mean);
            let left = (link - others).max(link * LEFT_MIN);
            let Ok(at) = Timestamp::from_second(*at_s) else { return left };
            let job = bounds.rate.and_then(|calendar| calendar.at(at, zone).rate);
            let caps = [job, self.caps.limits(at).agent.now];
            caps.into_iter().flatten().map(mib_s).fold(left, f64::min)
        };
        slots_s.iter().enumerate().map(left).collect()
    }
}

/// Infinite at times that are outside of all windows.
fn prices(windows: &Windows, zone: &TimeZone, times_s: &[i64]) -> Vec<f64> {
    let mut held = (false, i64::MIN);
    let price = |at_s: &i64| {
        if *at_s >= held.1 {
            let at = Timestamp::from_second(*at_s).unwrap_or(Timestamp::MAX);
            let opening = windows.at(at, zone);
            held = (opening.is_open, opening.until.map_or(i64::MAX, Timestamp::as_second));
        }
        if held.0 { 1.0 } else { f64::INFINITY }
    };
    times_s.iter().map(price).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_of_its_windows_nothing_is_to_be_had() {
        let windows: Windows = "22:00-06:00".parse().unwrap();
        let hour = |hour: i64| hour * 3600;
        let times: Vec<i64> = [20, 21, 22, 23, 24, 29, 30, 31, 46].map(hour).to_vec();
        let open: Vec<bool> = prices(&windows, &TimeZone::UTC, &times)
            .iter()
            .map(|price| price.is_finite())
            .collect();
        assert_eq!(open, [false, false, true, true, true, true, false, false, true]);
        let always = prices(&Windows::always(), &TimeZone::UTC, &times);
        assert_eq!(always, vec![1.0; times.len()]);
    }
}
