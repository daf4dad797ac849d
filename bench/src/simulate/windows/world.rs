//! One VM, one link, a day to cross it: what really comes, and what was known before.
//!
//! Invariant: what comes is played in steps of ten seconds by its own arithmetic, not by the planner's
//! formulas; forecasts use samples from before the moment they are made, and none after.

use anyhow::Result;
use longhaul_scheduler::courses;
use longhaul_scheduler::season::Season;
use longhaul_scheduler::timing::{Advice, Course, Crossing, advise};

/// Length of a slot in seconds, and slots of a day.
pub(super) const SLOT_S: u32 = 300;
pub(super) const DAY: usize = 288;
/// Seconds of a step.
const STEP_S: f64 = 10.0;
/// Longest pause of the guest.
const PAUSE_S: f64 = 0.3;

/// A link's leftover as a share of it, slot by slot, and what was expected of it at each slot.
#[derive(Debug)]
pub(super) struct Link {
    came: Vec<f64>,
    /// First slot at which forecasts were made.
    from: usize,
    expected: Vec<Vec<f32>>,
}

impl Link {
    /// Of a load in each slot, as a share of the link; forecasts from the slot `from` on.
    pub(super) fn new(load: &[f64], from: usize) -> Self {
        let mut season = Season::new(SLOT_S);
        let mut expected = Vec::new();
        for (slot, load) in load.iter().enumerate() {
            let at_s = slot as i64 * i64::from(SLOT_S);
            if slot >= from {
                let free = |load: f64| (1.0 - load).max(0.0) as f32;
                expected
                    .push(season.outlooks(at_s, DAY).iter().map(|said| free(said.mean)).collect());
            }
            season.observe(at_s, *load);
        }
        Self { came: load.iter().map(|load| 1.0 - load).collect(), from, expected }
    }

    pub(super) fn slots(&self) -> usize {
        self.came.len()
    }
}

/// One VM that is to cross within a day.
#[derive(Debug)]
pub(super) struct Trial<'a> {
    pub(super) link: &'a Link,
    /// Slot of the link at which it is asked for, which gives the hour of the day, too.
    pub(super) at: usize,
    /// The whole link, in MiB a second.
    pub(super) link_mib_s: f64,
    /// Memory and disk.
    pub(super) whole: f64,
    /// MiB a second that it changes, from its record's begin on.
    pub(super) dirty: Vec<f64>,
    /// Sample of it at which it is asked for.
    pub(super) from: usize,
    /// What an hour earlier is worth, as a share of all data.
    pub(super) haste: f64,
}

/// What came of it, in seconds after it was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Outcome {
    pub(super) mib: f64,
    pub(super) begins_s: f64,
    pub(super) ends_s: f64,
}

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// The planner by forecasts.
    Forecasts { in_parts: bool },
    /// The planner that is told the truth, in parts.
    Truth,
}

impl Trial<'_> {
    /// What the link leaves in a slot after it was asked for.
    fn rate(&self, slot: usize) -> f64 {
        self.link_mib_s * self.link.came[self.at + slot]
    }

    /// What is left after a slot in which all the time is sent, and what has crossed; or when all has crossed.
    fn send(&self, slot: usize, left: f64) -> (f64, f64, Option<f64>) {
        let (rate, dirty) = (self.rate(slot), self.dirty[self.from + slot]);
        let (mut left, mut mib) = (left, 0.0);
        for step in 0..(f64::from(SLOT_S) / STEP_S) as usize {
            if left <= rate * PAUSE_S {
                return (0.0, mib + left, Some(step as f64 * STEP_S));
            }
            let change = dirty * (1.0 - left / self.whole) - rate;
            if left + change * STEP_S <= rate * PAUSE_S && change < 0.0 {
                let took = left / -change;
                return (0.0, mib + rate * took, Some(step as f64 * STEP_S + took));
            }
            left = (left + change * STEP_S).min(self.whole);
            mib += rate * STEP_S;
        }
        (left, mib, None)
    }

    /// What is left after a slot in which nothing is sent.
    fn hold(&self, slot: usize, left: f64) -> f64 {
        let dirty = self.dirty[self.from + slot];
        let steps = (f64::from(SLOT_S) / STEP_S) as usize;
        (0..steps).fold(left, |left, _| {
            (left + dirty * (1.0 - left / self.whole) * STEP_S).min(self.whole)
        })
    }

    /// Plays the day; `sends` says of each slot, by what is left and whether it has begun, whether it is sent.
    fn play(
        &self,
        mut sends: impl FnMut(usize, f64, bool) -> Result<bool>,
    ) -> Result<Option<Outcome>> {
        let (mut left, mut mib, mut begins_s) = (self.whole, 0.0, None);
        for slot in 0..DAY {
            let now_s = slot as f64 * f64::from(SLOT_S);
            if !sends(slot, left, begins_s.is_some())? {
                left = self.hold(slot, left);
                continue;
            }
            let begins_s = *begins_s.get_or_insert(now_s);
            let (after, sent, ended) = self.send(slot, left);
            (left, mib) = (after, mib + sent);
            if let Some(after_s) = ended {
                return Ok(Some(Outcome { mib, begins_s, ends_s: now_s + after_s }));
            }
        }
        Ok(None)
    }

    /// Sent from a slot on without a stop; nothing if it has not crossed a day after it was asked for.
    pub(super) fn sent_from(&self, first: usize) -> Result<Option<Outcome>> {
        self.play(|slot, _, _| Ok(slot >= first))
    }

    /// Sent from the first 02:00 on.
    pub(super) fn at_two(&self) -> Result<Option<Outcome>> {
        let two = 2 * DAY / 24;
        self.sent_from((two + DAY - self.at % DAY) % DAY)
    }

    /// The best of all half hours, for who knows what comes.
    pub(super) fn all_knowing(&self) -> Result<Option<Outcome>> {
        let mut best: Option<Outcome> = None;
        for first in (0..DAY).step_by(6) {
            let one = self.sent_from(first)?;
            best = match (best, one) {
                (Some(best), Some(one)) if one.mib < best.mib => Some(one),
                (best, one) => best.or(one),
            };
        }
        Ok(best)
    }

    /// As the planner says, asked again each slot.
    pub(super) fn planned(&self, who: Who) -> Result<Option<Outcome>> {
        let in_parts = who != Who::Forecasts { in_parts: false };
        self.play(|slot, left, has_begun| {
            if has_begun && !in_parts {
                return Ok(true);
            }
            Ok(self.advice(who, slot, left, has_begun)?.sends)
        })
    }

    fn advice(&self, who: Who, slot: usize, left: f64, has_begun: bool) -> Result<Advice> {
        let now_s = slot as i64 * i64::from(SLOT_S);
        let courses = if who == Who::Truth {
            let link_mib_s = (slot..DAY).map(|slot| self.rate(slot)).collect();
            let dirty_mib_s = self.dirty[self.from + slot..self.from + DAY].to_vec();
            vec![Course { link_mib_s, dirty_mib_s }]
        } else {
            self.courses(slot)
        };
        let crossing = Crossing {
            name: "vm".to_owned(),
            whole_mib: self.whole,
            left_mib: left,
            courses,
            price: Vec::new(),
            slots_from_s: now_s,
            slot_s: SLOT_S,
            deadline_s: (DAY * SLOT_S as usize) as i64,
            pause_s: PAUSE_S,
            haste: self.haste,
            in_parts: who != Who::Forecasts { in_parts: false },
            has_begun,
        };
        Ok(advise(&crossing, now_s)?)
    }

    /// What may come from a slot on: of the VM as after moments like this one, and the link as it is expected.
    fn courses(&self, slot: usize) -> Vec<Course> {
        let expected = &self.link.expected[self.at + slot - self.link.from];
        let link_mib_s: Vec<f64> =
            expected[..DAY - slot].iter().map(|free| self.link_mib_s * f64::from(*free)).collect();
        let seen = &self.dirty[..self.from + slot];
        let days = courses::like_now(seen, DAY, DAY - slot);
        let course = |dirty_mib_s| Course { link_mib_s: link_mib_s.clone(), dirty_mib_s };
        days.into_iter().map(course).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asked for at noon: 6,000 MiB over 10 MiB/s.
    fn trial<'a>(link: &'a Link, dirty: impl Fn(usize) -> f64) -> Trial<'a> {
        Trial {
            link,
            at: 9 * DAY + DAY / 2,
            link_mib_s: 20.0,
            whole: 6000.0,
            dirty: (0..12 * DAY).map(dirty).collect(),
            from: 8 * DAY + DAY / 2,
            haste: 0.001,
        }
    }

    #[test]
    fn a_quiet_vm_goes_at_once_and_sends_what_there_is() {
        let link = Link::new(&vec![0.5; 12 * DAY], 8 * DAY);
        let quiet = trial(&link, |_| 0.0);
        let now = quiet.sent_from(0).unwrap().unwrap();
        assert!((now.mib - 6000.0).abs() < 1e-6 && now.ends_s <= 600.0, "{now:?}");
        assert_eq!(quiet.at_two().unwrap().unwrap().begins_s, 14.0 * 3600.0);
        for who in
            [Who::Forecasts { in_parts: false }, Who::Forecasts { in_parts: true }, Who::Truth]
        {
            assert_eq!(quiet.planned(who).unwrap(), Some(now));
        }
    }

    #[test]
    fn one_that_outruns_the_link_until_two_each_day_is_waited_for() {
        let link = Link::new(&vec![0.5; 12 * DAY], 8 * DAY);
        let busy = |slot: usize| if (144..168).contains(&(slot % DAY)) { 30.0 } else { 0.0 };
        let busy = trial(&link, busy);
        let now = busy.sent_from(0).unwrap().unwrap();
        assert!(now.mib > 5.0 * 6000.0, "{now:?}");
        let best = busy.all_knowing().unwrap().unwrap();
        assert!((best.mib - 6000.0).abs() < 1e-6, "{best:?}");
        let planned = busy.planned(Who::Forecasts { in_parts: false }).unwrap().unwrap();
        assert!(planned.mib < 1.1 * best.mib && planned.begins_s < 3.0 * 3600.0, "{planned:?}");
    }
}
