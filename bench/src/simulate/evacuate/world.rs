//! A site that must be emptied over one link, as it really goes, and what was known of it before.
//!
//! Invariant: the world is played second by second on the recorded series by its own arithmetic, not by
//! the planner's formulas; forecasts use samples from before the moment they are made, and none after.

use anyhow::Result;

/// Length of a slot in seconds.
pub(super) const SLOT_S: usize = 300;
/// Longest pause of a guest.
pub(super) const PAUSE_S: f64 = 0.3;
/// Samples of a week of the link: its period is 283.19 samples, not 288.
const WEEK: usize = 1982;
/// Samples of a day of the VMs.
const DAY: usize = 288;
/// Samples by which the level of a forecast is corrected, and over which that fades.
const LEVEL: usize = 12;
const FADES: f64 = 72.0;
/// The quantile of past errors that a cautious forecast has.
const CAUTIOUS: f64 = 0.05;
/// Below this share of its forecast the link is taken to stay as it is for half an hour.
const SHOCKED: f64 = 0.7;
const SHOCK_SLOTS: usize = 6;

/// One VM, as it really is.
#[derive(Debug, Clone)]
pub(super) struct Truth {
    pub(super) weight: u32,
    pub(super) memory_mib: u64,
    pub(super) whole: f64,
    /// MiB a second that it changes, from a week before the evacuation on.
    pub(super) dirty: Vec<f64>,
}

/// The evacuation, as it really is.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) vms: Vec<Truth>,
    /// Leftover in MiB a second from the beginning of the records on.
    pub(super) link: Vec<f64>,
    /// Index in it at which the evacuation starts.
    pub(super) start: usize,
    /// Seconds from then to the deadline.
    pub(super) deadline_s: usize,
    /// From when to when, in seconds, the link has half of it.
    pub(super) shock: Option<(usize, usize)>,
}

/// What a player sees.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) now_s: usize,
    /// MiB that each VM has left to send; nothing of one that has arrived.
    pub(super) left: &'a [Option<f64>],
    pub(super) under_way: Option<usize>,
    /// What the link gives now.
    pub(super) rate: f64,
    /// A VM has arrived since the last look, or this is the first.
    pub(super) is_free: bool,
}

/// Decides who is sent.
pub(super) trait Player {
    /// Who is sent from now on.
    ///
    /// # Errors
    ///
    /// When no plan can be made.
    fn next(&mut self, view: &View<'_>) -> Result<Option<usize>>;
}

impl World {
    /// What the link gives at a second.
    pub(super) fn rate(&self, at_s: usize) -> f64 {
        let half = self.shock.is_some_and(|(from, to)| (from..to).contains(&at_s));
        let rate = self.link[self.start + at_s / SLOT_S];
        if half { rate / 2.0 } else { rate }
    }

    pub(super) fn dirty(&self, vm: usize, at_s: usize) -> f64 {
        self.vms[vm].dirty[7 * DAY + at_s / SLOT_S]
    }

    /// Plays one VM at a time; says which have arrived.
    pub(super) fn play(&self, player: &mut impl Player) -> Result<Vec<bool>> {
        let mut left: Vec<Option<f64>> = self.vms.iter().map(|vm| Some(vm.whole)).collect();
        let (mut under_way, mut is_free) = (None, true);
        for now_s in 0..self.deadline_s {
            let rate = self.rate(now_s);
            // A look at each slot's tenth second, when its rate is known, and when someone arrived.
            if is_free || now_s % SLOT_S == 10 {
                let view = View { now_s, left: &left, under_way, rate, is_free };
                let next = player.next(&view)?;
                if next != under_way {
                    // Whoever is given up begins anew.
                    for (vm, left) in left.iter_mut().enumerate() {
                        *left = left.map(|_| self.vms[vm].whole);
                    }
                    under_way = next;
                }
                is_free = false;
            }
            let Some(vm) = under_way else { continue };
            let Some(now_left) = left[vm] else {
                (under_way, is_free) = (None, true);
                continue;
            };
            let after = second(now_left, self.vms[vm].whole, self.dirty(vm, now_s), rate);
            left[vm] = Some(after);
            if after <= rate * PAUSE_S {
                left[vm] = None;
                (under_way, is_free) = (None, true);
            }
        }
        Ok(left.iter().map(Option::is_none).collect())
    }

    /// Plays all at once, each with the same share of the link.
    pub(super) fn play_all_at_once(&self) -> Vec<bool> {
        let mut left: Vec<Option<f64>> = self.vms.iter().map(|vm| Some(vm.whole)).collect();
        for now_s in 0..self.deadline_s {
            let share = self.rate(now_s) / left.iter().flatten().count().max(1) as f64;
            for (vm, left) in left.iter_mut().enumerate() {
                let after =
                    left.map(|left| second(left, self.vms[vm].whole, self.dirty(vm, now_s), share));
                *left = after.filter(|after| *after > share * PAUSE_S);
            }
        }
        left.iter().map(Option::is_none).collect()
    }

    /// Weight of those that have arrived.
    pub(super) fn weight(&self, arrived: &[bool]) -> u32 {
        let of = |(vm, arrived): (&Truth, &bool)| if *arrived { vm.weight } else { 0 };
        self.vms.iter().zip(arrived).map(of).sum()
    }

    /// Slots to the deadline.
    pub(super) fn slots(&self) -> usize {
        self.deadline_s.div_ceil(SLOT_S)
    }

    /// Leftover as it will be; a slot in part of a shock has its mean.
    pub(super) fn true_link(&self) -> Vec<f64> {
        let mean = |slot: usize| {
            (slot * SLOT_S..(slot + 1) * SLOT_S).map(|at_s| self.rate(at_s)).sum::<f64>()
                / SLOT_S as f64
        };
        (0..self.slots()).map(mean).collect()
    }

    /// Changes as they will be.
    pub(super) fn true_dirty(&self, vm: usize) -> Vec<f64> {
        self.vms[vm].dirty[7 * DAY..7 * DAY + self.slots()].to_vec()
    }

    /// Leftover from a slot to the deadline as it is expected, and cautiously. `seen` is what the link
    /// gives in that slot; nothing before the evacuation.
    pub(super) fn forecast_link(&self, slot: usize, seen: Option<f64>) -> (Vec<f64>, Vec<f64>) {
        let origin = self.start + slot;
        let slots = self.slots() - slot;
        let mut expected = profile(&self.link, origin, slots);
        let caution = self.caution(slots);
        let mut cautious: Vec<f64> =
            expected.iter().zip(caution).map(|(rate, ratio)| rate * ratio).collect();
        let Some(seen) = seen else { return (expected, cautious) };
        let ratio = seen / expected[0].max(f64::MIN_POSITIVE);
        let stays = if ratio < SHOCKED { SHOCK_SLOTS.min(slots) } else { 1 };
        for series in [&mut expected, &mut cautious] {
            series[0] = seen;
            series[1..stays].iter_mut().for_each(|rate| *rate *= ratio);
        }
        (expected, cautious)
    }

    /// By how much forecasts of the week before the evacuation were too high, for each slot ahead: a
    /// quantile of what came over what was expected, summed up to then.
    fn caution(&self, slots: usize) -> Vec<f64> {
        let ahead = slots.min(WEEK / 2);
        let origins: Vec<usize> =
            (0..48).map(|at| self.start - ahead - at * (WEEK - 12) / 48).collect();
        let came: Vec<(Vec<f64>, usize)> =
            origins.iter().map(|&origin| (profile(&self.link, origin, ahead), origin)).collect();
        let mut sums = vec![(0.0, 0.0); came.len()];
        let mut quantiles = Vec::with_capacity(slots);
        for slot in 0..ahead {
            for (sum, (expected, origin)) in sums.iter_mut().zip(&came) {
                sum.0 += self.link[origin + slot];
                sum.1 += expected[slot];
            }
            let mut ratios: Vec<f64> = sums.iter().map(|(came, said)| came / said).collect();
            ratios.sort_by(f64::total_cmp);
            quantiles.push(ratios[(ratios.len() as f64 * CAUTIOUS) as usize].min(1.0));
        }
        let last = quantiles.last().copied().unwrap_or(1.0);
        quantiles.resize(slots, last);
        quantiles
    }

    /// What a VM is expected to change from a slot to the deadline, and cautiously: the hour of the seven
    /// days before, and what it did lately, which fades.
    pub(super) fn forecast_dirty(&self, vm: usize, slot: usize) -> (Vec<f64>, Vec<f64>) {
        let seen = &self.vms[vm].dirty[..7 * DAY + slot];
        let hours = hours_of(seen);
        let hour = |at: usize| (at % DAY) / 12;
        let lately = seen[seen.len() - 6..].iter().sum::<f64>() / 6.0;
        let here = hours[hour(seen.len())];
        (0..self.slots() - slot)
            .map(|ahead| {
                let (mean, high) = hours[hour(seen.len() + ahead)];
                let fade = (-(ahead as f64) / LEVEL as f64).exp();
                let expected = (mean + (lately - here.0) * fade).max(0.0);
                (expected, expected.max(high))
            })
            .unzip()
    }
}

/// Of each hour of the last seven days the mean, and what it reaches in a bad case: nine tenths'
/// quantile of the hour, or 95 hundredths' of the whole week if that is more.
fn hours_of(seen: &[f64]) -> Vec<(f64, f64)> {
    let mut hours = vec![Vec::new(); 24];
    for (at, dirty) in seen.iter().enumerate().skip(seen.len() - 7 * DAY) {
        hours[at % DAY / 12].push(*dirty);
    }
    let quantile = |mut of: Vec<f64>, percent: usize| {
        of.sort_by(f64::total_cmp);
        of.get(of.len() * percent / 100).copied().unwrap_or(0.0)
    };
    let whole = quantile(seen[seen.len() - 7 * DAY..].to_vec(), 95);
    let of = |of: Vec<f64>| {
        let mean = of.iter().sum::<f64>() / of.len().max(1) as f64;
        (mean, quantile(of, 90).max(whole))
    };
    hours.into_iter().map(of).collect()
}

/// Mean of the same time of the two weeks before, with the level of the last hour, which fades.
fn profile(link: &[f64], origin: usize, slots: usize) -> Vec<f64> {
    let weeks = |at: usize| {
        // Of slots more than a week ahead there is no last week.
        let back = if at >= origin + WEEK { 2 } else { 1 };
        f64::midpoint(link[at - back * WEEK], link[at - (back + 1) * WEEK])
    };
    let recent: f64 = (origin - LEVEL..origin).map(|at| link[at] - weeks(at)).sum();
    let level = recent / LEVEL as f64;
    (0..slots)
        .map(|ahead| (weeks(origin + ahead) + level * (-(ahead as f64) / FADES).exp()).max(0.0))
        .collect()
}

/// What is left after a second.
fn second(left: f64, whole: f64, dirty: f64, rate: f64) -> f64 {
    (left + dirty * (1.0 - left / whole) - rate).clamp(0.0, whole)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// VMs of so many MiB that change nothing, over 10 MiB/s.
    pub(in super::super) fn quiet(sizes: &[f64], deadline_s: usize) -> World {
        let vm = |whole: &f64| Truth {
            weight: 1,
            memory_mib: 1,
            whole: *whole,
            dirty: vec![0.0; 9 * DAY],
        };
        World {
            vms: sizes.iter().map(vm).collect(),
            link: vec![10.0; 4 * WEEK],
            start: 3 * WEEK + 100,
            deadline_s,
            shock: None,
        }
    }

    #[test]
    fn forecasts_of_a_level_are_that_level_and_see_a_shock_only_when_it_is_there() {
        let mut world = quiet(&[100.0], 3600);
        world.shock = Some((0, 1800));
        assert_eq!(world.forecast_link(0, None), (vec![10.0; 12], vec![10.0; 12]));
        let (expected, _) = world.forecast_link(0, Some(world.rate(0)));
        assert_eq!(expected, [vec![5.0; 6], vec![10.0; 6]].concat());
        assert_eq!(world.forecast_dirty(0, 0).1, vec![0.0; 12]);
    }

    #[test]
    fn all_at_once_share_the_link() {
        assert_eq!(quiet(&[100.0, 1000.0], 105).play_all_at_once(), [true, false]);
        assert_eq!(quiet(&[100.0, 1000.0], 115).play_all_at_once(), [true, true]);
    }
}
