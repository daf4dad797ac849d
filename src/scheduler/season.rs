//! What a series that follows days and weeks does next, as the load of a link.
//!
//! Invariant: what is said of a time uses samples from before it was said, and errors that were known by
//! then. A [`Season`] is of bounded size, whatever it has seen, and ignores samples that are no number or
//! do not come after the last one.
//!
//! Six simple predictors speak, weighted by how little each has missed lately at about that distance:
//! the days and weeks before as they were, the same at today's level, half way between the two, at the level
//! of just now, yesterday's with what the week before changed from day to day, and no change at all. A
//! weighting of many is within a little of the best of them on each recorded network (docs/scheduler.md), where
//! choosing one is not.
//!
//! The mark that four of five values stay below is a quantile of what was missed in the last seven days; by
//! how often it was passed, that quantile itself is moved (adaptive conformal inference, Gibbs and Candes,
//! NeurIPS 2021).

use std::collections::VecDeque;

const DAY_S: i64 = 86_400;
/// Weeks that are kept.
const WEEKS: usize = 9;
/// What a day or a week counts against the one after it.
const OLDER: f64 = 0.9;
/// Half the width over which an earlier day is averaged, in seconds.
const SMOOTH_S: i64 = 1800;
/// Seconds over which the level of just now is taken.
const NOW_S: i64 = 900;
/// Distances ahead at which errors are kept, in seconds; the first is one slot.
const AHEAD_S: [i64; 4] = [0, 3600, 6 * 3600, DAY_S];
/// Days over which a predictor's errors are forgotten, and how steeply it counts by them.
const FORGET_DAYS: f64 = 2.0;
const STEEPNESS: i32 = 4;
/// The share of values that stay below the high mark, and how fast its quantile follows.
const HIGH: f64 = 0.8;
const FOLLOW: f64 = 0.03;
/// Days whose misses make that quantile.
const MISSES_DAYS: usize = 7;
/// What a mark is above the mean while nothing was missed yet.
const COLD: f64 = 0.2;
/// No gap is filled that is longer than this; the series begins anew.
const GAP_S: i64 = 7 * DAY_S;
/// Bounds of a level against another, which one strange day would else make as strange.
const LEVEL_MAX: f64 = 5.0;
const PREDICTORS: usize = 6;

/// What is expected of a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Expected.
    pub mean: f64,
    /// What four of five values stay below.
    pub high: f64,
}

/// The running knowledge of one series.
#[derive(Debug, Clone)]
pub struct Season {
    slot_s: i64,
    /// Slot of the oldest value, counted from the epoch.
    first: i64,
    values: VecDeque<f64>,
    /// Samples of the newest slot, whose mean its value is.
    newest: u32,
    ahead: [Ahead; AHEAD_S.len()],
}

/// What was said so far ahead, and what came of it.
#[derive(Debug, Clone)]
struct Ahead {
    slots: usize,
    /// What was said in the last `slots` slots, oldest first.
    said: VecDeque<Said>,
    errors: [f64; PREDICTORS],
    /// Logarithms of what came over what was expected: as they came, and sorted.
    misses: VecDeque<f64>,
    sorted: Vec<f64>,
    /// The quantile that is the mark now. It goes beyond 0 and 1 by what is judged before a change of it can
    /// show: to stop there would count what comes back a day late only where it lowers the mark, and without
    /// any end a series that never changed would leave it out of reach.
    quantile: f64,
}

#[derive(Debug, Clone, Copy)]
struct Said {
    each: [f64; PREDICTORS],
    outlook: Outlook,
}

impl Ahead {
    fn new(slots: usize) -> Self {
        Self {
            slots,
            said: VecDeque::new(),
            errors: [0.0; PREDICTORS],
            misses: VecDeque::new(),
            sorted: Vec::new(),
            quantile: HIGH,
        }
    }

    /// What came where the oldest that was said spoke of.
    fn learn(&mut self, came: f64, per_day: f64) {
        if self.said.len() < self.slots {
            return;
        }
        let Some(said) = self.said.pop_front() else { return };
        let forget = if self.misses.is_empty() { 1.0 } else { 1.0 / (FORGET_DAYS * per_day) };
        for (error, said) in self.errors.iter_mut().zip(said.each) {
            *error += forget * ((came - said).abs() - *error);
        }
        let passed = came > said.outlook.high;
        self.quantile += FOLLOW * (HIGH - if passed { 0.0 } else { 1.0 });
        let reach = FOLLOW * self.slots as f64;
        self.quantile = self.quantile.clamp(-reach * (1.0 - HIGH), 1.0 + reach * HIGH);
        if came <= 0.0 || said.outlook.mean <= 0.0 {
            return;
        }
        let miss = (came / said.outlook.mean).ln();
        let most = (per_day as usize).max(1) * MISSES_DAYS;
        if self.misses.len() == most
            && let Some(old) = self.misses.pop_front()
        {
            let place = self.sorted.partition_point(|one| *one < old);
            self.sorted.remove(place.min(self.sorted.len() - 1));
        }
        self.misses.push_back(miss);
        let place = self.sorted.partition_point(|one| *one < miss);
        self.sorted.insert(place, miss);
    }

    fn outlook(&self, each: [f64; PREDICTORS]) -> Outlook {
        let (mut sum, mut all) = (0.0, 0.0);
        let least = self.errors.iter().copied().fold(f64::INFINITY, f64::min);
        for (error, said) in self.errors.iter().zip(each) {
            // The best one counts 1; all of them before anything is known.
            let weight = if *error > 0.0 { (least / error).powi(STEEPNESS) } else { 1.0 };
            sum += weight * said;
            all += weight;
        }
        let mean = if all > 0.0 { sum / all } else { 0.0 };
        let at = (self.quantile.clamp(0.0, 1.0) * self.sorted.len() as f64) as usize;
        let miss = self.sorted.get(at.min(self.sorted.len().saturating_sub(1)));
        Outlook { mean, high: mean * miss.copied().unwrap_or(COLD).exp() }
    }
}

impl Season {
    /// Of a series whose samples are averaged over slots of `slot_s` seconds, which a day is a multiple of;
    /// anything else is taken for 300.
    pub fn new(slot_s: u32) -> Self {
        let slot_s = i64::from(slot_s);
        let slot_s =
            if (10..=3600).contains(&slot_s) && DAY_S % slot_s == 0 { slot_s } else { 300 };
        Self {
            slot_s,
            first: 0,
            values: VecDeque::new(),
            newest: 0,
            ahead: AHEAD_S.map(|ahead_s| Ahead::new((ahead_s / slot_s).max(1) as usize)),
        }
    }

    /// Takes a sample of the time `at_s`, in seconds since the epoch. What lies between it and the one
    /// before it is taken to have been as that one, up to a week; a longer gap begins the series anew.
    pub fn observe(&mut self, at_s: i64, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        let slot = at_s.div_euclid(self.slot_s);
        let Some(mut last) = self.last_slot() else {
            self.first = slot;
            self.values.push_back(value);
            self.newest = 1;
            return;
        };
        if slot < last {
            return;
        }
        if slot == last {
            if let Some(newest) = self.values.back_mut() {
                self.newest = self.newest.saturating_add(1);
                *newest += (value - *newest) / f64::from(self.newest);
            }
            return;
        }
        if slot - last > GAP_S / self.slot_s {
            *self = Self::new(self.slot_s as u32);
            self.observe(at_s, value);
            return;
        }
        while last < slot {
            self.end_slot(last);
            last += 1;
            let before = self.values.back().copied().unwrap_or(value);
            self.values.push_back(if last == slot { value } else { before });
            if self.values.len() > WEEKS * 7 * self.per_day() {
                self.values.pop_front();
                self.first += 1;
            }
        }
        self.newest = 1;
    }

    /// What is expected of the time `at_s`; nothing before there is a sample, or of a time that is past.
    pub fn outlook(&self, at_s: i64) -> Option<Outlook> {
        let last = self.last_slot()?;
        let target = at_s.div_euclid(self.slot_s);
        if target <= last {
            return None;
        }
        Some(self.outlook_of(&self.levels(last), last, target))
    }

    /// What is expected of so many slots from that of `from_s` on; nothing before there is a sample, or of a
    /// time that is past.
    pub fn outlooks(&self, from_s: i64, slots: usize) -> Vec<Outlook> {
        let first = from_s.div_euclid(self.slot_s);
        let Some(last) = self.last_slot().filter(|last| first > *last) else { return Vec::new() };
        let levels = self.levels(last);
        (first..first + slots as i64).map(|slot| self.outlook_of(&levels, last, slot)).collect()
    }

    fn outlook_of(&self, levels: &Levels, last: i64, target: i64) -> Outlook {
        let ahead = (target - last) as usize;
        let each = self.each(levels, last, target);
        // One of four distances is the nearest one: there is always one.
        let nearest = self.ahead.iter().min_by_key(|one| one.slots.abs_diff(ahead));
        nearest.unwrap_or(&self.ahead[0]).outlook(each)
    }

    fn per_day(&self) -> usize {
        (DAY_S / self.slot_s) as usize
    }

    fn last_slot(&self) -> Option<i64> {
        (!self.values.is_empty()).then(|| self.first + self.values.len() as i64 - 1)
    }

    /// A slot has got all its samples: what was said of it is judged, and the next are spoken of.
    fn end_slot(&mut self, slot: i64) {
        let Some(came) = self.values.back().copied() else { return };
        let levels = self.levels(slot);
        let per_day = self.per_day() as f64;
        let said = std::array::from_fn::<_, { AHEAD_S.len() }, _>(|at| {
            self.each(&levels, slot, slot + self.ahead[at].slots as i64)
        });
        for (one, each) in self.ahead.iter_mut().zip(said) {
            one.learn(came, per_day);
            one.said.push_back(Said { each, outlook: one.outlook(each) });
        }
    }

    /// What each predictor says of the slot `target`, from what was there by the slot `now`.
    fn each(&self, levels: &Levels, now: i64, target: i64) -> [f64; PREDICTORS] {
        let (day, ahead) = (self.per_day() as i64, target - now);
        let last = self.at(now);
        let mut lags = levels.weeks.iter().filter(|lag| lag.slots >= ahead).peekable();
        let (mut before, mut level, mut here, mut weights) = (0.0, 0.0, 0.0, 0.0);
        let has_weeks = lags.peek().is_some();
        let days = levels.days.iter().filter(|lag| !has_weeks && lag.slots >= ahead);
        for (lag, weight) in
            lags.chain(days).zip(std::iter::successors(Some(1.0), |w| Some(w * OLDER)))
        {
            before += weight * self.smooth(target - lag.slots, now);
            here += weight * self.smooth(now - lag.slots, now);
            level += weight * lag.mean;
            weights += weight;
        }
        if weights <= 0.0 {
            return [last; PREDICTORS];
        }
        let before = before / weights;
        let of_day = ratio(levels.today, level / weights);
        let of_now = ratio(levels.now, here / weights);
        let days = (ahead + day - 1) / day * day;
        let yesterday = self.smooth(target - days, now);
        let week = (ahead + 7 * day - 1) / (7 * day) * 7 * day;
        let same = if has_weeks && target - week - days >= self.first {
            let changed =
                ratio(self.smooth(target - week, now), self.smooth(target - week - days, now));
            yesterday * changed
        } else {
            yesterday
        };
        [before, before * of_day, before * of_day.sqrt(), before * of_now, same, last]
    }

    /// What the series was like by the slot `now`, for whatever target.
    fn levels(&self, now: i64) -> Levels {
        let day = self.per_day() as i64;
        let lags = |unit: i64, whole: bool| {
            (1..=WEEKS as i64)
                .map(|times| times * unit)
                .take_while(|lag| now - lag - if whole { day } else { 0 } >= self.first)
                .map(|slots| Lag { slots, mean: self.mean(now - slots - day + 1, now - slots) })
                .collect()
        };
        Levels {
            today: self.mean(now - day + 1, now),
            now: self.mean(now - NOW_S / self.slot_s + 1, now),
            weeks: lags(7 * day, true),
            days: lags(day, false),
        }
    }

    fn at(&self, slot: i64) -> f64 {
        let place = usize::try_from(slot - self.first).ok();
        place.and_then(|place| self.values.get(place)).copied().unwrap_or(0.0)
    }

    /// The mean around `slot`, of what was there by `now`.
    fn smooth(&self, slot: i64, now: i64) -> f64 {
        let half = SMOOTH_S / self.slot_s;
        self.mean(slot - half, (slot + half).min(now))
    }

    /// The mean of the slots from `from` to `to`, of those that there are.
    fn mean(&self, from: i64, to: i64) -> f64 {
        let from = (from - self.first).max(0) as usize;
        let to = (to - self.first + 1).clamp(0, self.values.len() as i64) as usize;
        if from >= to {
            return 0.0;
        }
        self.values.range(from..to).sum::<f64>() / (to - from) as f64
    }
}

/// A day or a week before now, and the mean of the day that ended then.
#[derive(Debug)]
struct Lag {
    slots: i64,
    mean: f64,
}

#[derive(Debug)]
struct Levels {
    /// Mean of the day up to now, and of the last quarter of an hour.
    today: f64,
    now: f64,
    weeks: Vec<Lag>,
    days: Vec<Lag>,
}

fn ratio(one: f64, other: f64) -> f64 {
    if other > 0.0 { (one / other).clamp(1.0 / LEVEL_MAX, LEVEL_MAX) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: i64 = 300;

    /// After `days` of a series.
    fn after(days: i64, series: impl Fn(i64) -> f64) -> Season {
        let mut season = Season::new(SLOT as u32);
        for slot in 0..days * 288 {
            season.observe(slot * SLOT, series(slot));
        }
        season
    }

    fn hour(slot: i64) -> i64 {
        slot / 12 % 24
    }

    #[test]
    fn a_day_that_repeats_is_known_a_day_ahead() {
        let series = |slot| if (8..18).contains(&hour(slot)) { 90.0 } else { 10.0 };
        let season = after(10, series);
        for ahead in [1, 12, 100, 200, 288] {
            let slot = 10 * 288 - 1 + ahead;
            let outlook = season.outlook(slot * SLOT).unwrap();
            let borders = (hour(slot - 7) == hour(slot)) && (hour(slot + 7) == hour(slot));
            let right =
                (outlook.mean - series(slot)).abs() < 5.0 && outlook.high >= series(slot) - 5.0;
            assert!(right || !borders, "{ahead}: {outlook:?} for {}", series(slot));
        }
    }

    #[test]
    fn many_slots_are_foreseen_as_each_of_them() {
        let season = after(10, |slot| hour(slot) as f64);
        let from_s = 10 * 288 * SLOT;
        let many = season.outlooks(from_s, 300);
        for (ahead, outlook) in many.iter().enumerate() {
            assert_eq!(season.outlook(from_s + ahead as i64 * SLOT), Some(*outlook));
        }
        assert_eq!(many.len(), 300);
        assert!(season.outlooks(from_s - SLOT, 3).is_empty());
    }

    #[test]
    fn a_weekend_is_known_from_the_one_before() {
        let series = |slot: i64| if slot / 288 % 7 >= 5 { 20.0 } else { 80.0 };
        let season = after(5 * 7 + 5, series);
        let saturday = season.outlook((40 * 288 + 150) * SLOT).unwrap();
        assert!((saturday.mean - 20.0).abs() < 6.0, "{saturday:?}");
    }

    #[test]
    fn four_of_five_stay_below_the_mark() {
        // Noise that no predictor knows, from a small generator.
        let noise = |slot: i64| {
            let mixed = (slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            50.0 + (mixed >> 40) as f64 / (1u64 << 24) as f64 * 50.0
        };
        let mut season = Season::new(SLOT as u32);
        let (mut below, mut all) = (0, 0);
        for slot in 0..30 * 288 {
            let said = season.outlook(slot * SLOT);
            season.observe(slot * SLOT, noise(slot));
            if slot > 10 * 288 {
                all += 1;
                below += u32::from(said.is_some_and(|said| noise(slot) <= said.high));
            }
        }
        let share = f64::from(below) / f64::from(all);
        assert!((0.78..0.82).contains(&share), "{share}");
    }

    #[test]
    fn a_series_that_never_changed_leaves_the_mark_in_reach() {
        let mut season = after(30, |_| 50.0);
        let mut passed = 0;
        for slot in 30 * 288..32 * 288 {
            let value = if slot % 2 == 0 { 40.0 } else { 60.0 };
            let said = season.outlook(slot * SLOT).unwrap();
            passed += u32::from(slot >= 31 * 288 && value > said.high);
            season.observe(slot * SLOT, value);
        }
        assert!(passed < 75, "{passed}");
    }

    #[test]
    fn gaps_are_bridged_and_long_ones_begin_anew() {
        let mut season = after(2, |_| 5.0);
        season.observe((2 * 288 + 100) * SLOT, 5.0);
        assert_eq!(season.values.len(), 2 * 288 + 101);
        season.observe(100 * 288 * SLOT, 7.0);
        assert_eq!(season.values.len(), 1);
        assert_eq!(season.outlook((100 * 288 + 5) * SLOT).unwrap().mean, 7.0);
    }

    #[test]
    fn what_is_no_sample_changes_nothing_and_the_size_is_bounded() {
        let mut season = after(70, |slot| slot as f64);
        assert_eq!(season.values.len(), WEEKS * 7 * 288);
        for (at_s, value) in [(i64::MAX / 2, f64::NAN), (0, 1.0), (i64::MAX / 2, -1.0)] {
            season.observe(at_s, value);
        }
        assert_eq!(season.at(70 * 288 - 1), (70 * 288 - 1) as f64);
        assert_eq!(season.outlook(0), None);
        assert_eq!(Season::new(300).outlook(300), None);
    }
}
