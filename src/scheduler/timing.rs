//! When a VM's data should cross a link, so that least of it crosses twice and all of it in time.
//!
//! Invariant: [`advise`] is data in, data out. It is asked again and again, with what has become of the
//! forecasts since, and its answer is about now only: send, or hold back. Where nothing may be sent it
//! never says send, and it does not wait for a better hour when that risks the deadline in more of the
//! possible courses than it must.
//!
//! What is to come is given as several possible *courses*, each as likely as the others: a guest's last
//! days, say. Starts are held against each other by their mean cost over the courses: to wait for an hour is
//! worth it only if that hour is better in most of them. (To take the best hour of each course for its own
//! makes waiting look better than it is: a guest that is busy at random has a quiet hour on each of its days, and
//! it may be now.) For the same reason sending in parts stops and goes on by a rule that knows nothing of
//! what comes: a slot in which more than some share of what crosses is spoiled is left out, and which share
//! that is is chosen with the start.
//!
//! Cost is what crosses, by its price; a little for each hour that all waits; and for a VM that does not arrive
//! by the deadline more than any way to arrive could cost.

use serde::{Deserialize, Serialize};

use crate::state::InvalidState;
use crate::stretch::{Step, Stretch};

/// Shares of what crosses that must not be spoiled meanwhile, between which sending in parts chooses.
const USEFUL: [f64; 4] = [f64::NEG_INFINITY, 0.3, 0.6, 0.85];
/// Starts that are looked at: each of so many slots from now on, and every third after them.
const NEAR: usize = 12;
const FAR_STEP: usize = 3;
/// What arriving too late costs, in times of all data, and of what is left then: who is late anyway is to be
/// nearly there.
const LATE: f64 = 20.0;
const LATE_LEFT: f64 = 4.0;
/// Most slots and most courses that are looked at.
const SLOTS_MAX: usize = 10_000;
const COURSES_MAX: usize = 64;

/// A VM's data and what is to come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Crossing {
    /// The VM's name, for people.
    pub name: String,
    /// All of it, in MiB.
    pub whole_mib: f64,
    /// What the target does not have.
    pub left_mib: f64,
    /// What could come, each as likely as the others.
    pub courses: Vec<Course>,
    /// What a MiB costs in each slot, 1 being usual; infinite where nothing may cross. Empty: always 1.
    pub price: Vec<f64>,
    /// When the first slot begins; now is within it.
    pub slots_from_s: i64,
    /// Length of a slot in seconds.
    pub slot_s: u32,
    /// When all must have crossed.
    pub deadline_s: i64,
    /// Longest pause of the guest at the end, in seconds.
    pub pause_s: f64,
    /// What an hour earlier is worth, as a share of all data.
    pub haste: f64,
    /// Whether sending may stop and go on later, as that of a disk may; if not, it goes on once it has begun.
    pub in_parts: bool,
    /// Whether sending has begun.
    pub has_begun: bool,
}

/// One way in which things may come, slot by slot up to the deadline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// What the link carries for this VM, in MiB a second.
    pub link_mib_s: Vec<f64>,
    /// What the VM changes, in MiB a second.
    pub dirty_mib_s: Vec<f64>,
}

/// What to do now, and what is expected of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Advice {
    /// Whether to send now.
    pub sends: bool,
    /// Cost of the better of the two, in MiB at the usual price.
    pub cost_mib: f64,
    /// What sending from now on would cost; infinite where it may not.
    pub now_mib: f64,
    /// What the best later start would cost; infinite if there is none.
    pub later_mib: f64,
    /// Share of the courses in which all has crossed by the deadline.
    pub in_time: f64,
    /// When sending is to begin; nothing if it never may.
    pub starts_s: Option<i64>,
    /// When all has crossed in the middle one; nothing if that is too late in half of them.
    pub ends_s: Option<i64>,
}

/// What is best now.
///
/// # Errors
///
/// When it contradicts itself: a size or a rate that is no number, courses that end before the deadline.
pub fn advise(crossing: &Crossing, now_s: i64) -> Result<Advice, InvalidState> {
    crossing.check(now_s)?;
    let slots = crossing.slots(now_s);
    let plays: Vec<Play<'_>> =
        crossing.courses.iter().map(|course| Play::new(crossing, course, &slots)).collect();
    let useful = if crossing.in_parts { &USEFUL[..] } else { &USEFUL[..1] };
    let mean = |first: usize, useful: f64| {
        plays.iter().map(|play| play.from(first, useful).cost).sum::<f64>() / plays.len() as f64
    };
    // The least of a slot, with the share that it is for.
    let best_of = |first: usize| {
        let each = useful.iter().map(|useful| (mean(first, *useful), *useful));
        each.min_by(|one, other| one.0.total_cmp(&other.0)).unwrap_or((f64::INFINITY, 0.0))
    };
    let is_open = |slot: &usize| slots[*slot].price < f64::INFINITY;
    let now = Some(0)
        .filter(|slot| *slot < slots.len())
        .filter(is_open)
        .map(|slot| (slot, best_of(slot)));
    let starts = (1..slots.len())
        .filter(|slot| *slot < NEAR || slot % FAR_STEP == 0 || !is_open(&(slot - 1)));
    let goes_on = crossing.has_begun && !crossing.in_parts && now.is_some();
    let later = starts.filter(|slot| !goes_on && is_open(slot)).map(|slot| (slot, best_of(slot)));
    let later = later.min_by(|one, other| one.1.0.total_cmp(&other.1.0));
    let cost = |start: &Option<(usize, (f64, f64))>| start.map_or(f64::INFINITY, |one| one.1.0);
    let (now_mib, later_mib) = (cost(&now), cost(&later));
    let sends = now.is_some() && now_mib <= later_mib;
    let start = if sends { now } else { later };
    let ends_s = |play: &Play<'_>| start.and_then(|(first, best)| play.from(first, best.1).ends_s);
    let mut ends: Vec<f64> = plays.iter().filter_map(ends_s).collect();
    ends.sort_by(f64::total_cmp);
    let middle = ends.get(plays.len() / 2);
    Ok(Advice {
        sends,
        cost_mib: now_mib.min(later_mib),
        now_mib,
        later_mib,
        in_time: ends.len() as f64 / plays.len() as f64,
        starts_s: start.map(|(slot, _)| now_s + slots[slot].after_s as i64),
        ends_s: middle.map(|ends_s| now_s + *ends_s as i64),
    })
}

impl Crossing {
    fn check(&self, now_s: i64) -> Result<(), InvalidState> {
        let wrong = InvalidState::Crossing;
        let name = || self.name.clone();
        if !(self.whole_mib.is_finite() && self.whole_mib > 0.0) {
            return Err(InvalidState::NotPositive { what: "memory and disk", name: name() });
        }
        let rates = [self.left_mib, self.pause_s, self.haste];
        if !rates.iter().all(is_rate) || self.left_mib > self.whole_mib {
            return Err(wrong(
                "left, pause and haste must be zero or more, and no more left than there is",
            ));
        }
        if self.slot_s == 0 || self.courses.is_empty() || self.courses.len() > COURSES_MAX {
            return Err(wrong("courses must be 1 to 64, of slots longer than nothing"));
        }
        if [now_s, self.slots_from_s, self.deadline_s].iter().any(|at| at.unsigned_abs() > 1 << 40)
        {
            return Err(wrong("times must be within 2^40 seconds of 1970"));
        }
        if !(0..i64::from(self.slot_s)).contains(&(now_s - self.slots_from_s)) {
            return Err(wrong("first slot must be that of now"));
        }
        let slots = self.slot_count();
        if slots > SLOTS_MAX {
            return Err(wrong("deadline must be within 10,000 slots"));
        }
        for Course { link_mib_s, dirty_mib_s } in &self.courses {
            if link_mib_s.len() < slots || dirty_mib_s.len() < slots {
                return Err(wrong("courses must reach its deadline"));
            }
            if !link_mib_s.iter().chain(dirty_mib_s).all(is_rate) {
                return Err(InvalidState::NoRate { what: "a course", name: name() });
            }
        }
        let is_price = |price: &f64| *price >= 0.0;
        if !self.price.iter().all(is_price)
            || !matches!(self.price.len(), 0) && self.price.len() < slots
        {
            return Err(wrong("prices must be zero or more, and reach its deadline"));
        }
        Ok(())
    }

    fn slot_count(&self) -> usize {
        let span = (self.deadline_s - self.slots_from_s).max(0).unsigned_abs();
        usize::try_from(span.div_ceil(u64::from(self.slot_s))).unwrap_or(usize::MAX)
    }

    /// The slots from now to the deadline; of the first one what is left of it.
    fn slots(&self, now_s: i64) -> Vec<Slot> {
        let at = |slot: usize| self.slots_from_s + slot as i64 * i64::from(self.slot_s);
        let of = |slot: usize| {
            let (from_s, to_s) = (at(slot).max(now_s), at(slot + 1).min(self.deadline_s));
            Slot {
                after_s: (from_s - now_s) as f64,
                span_s: (to_s - from_s).max(0) as f64,
                price: self.price.get(slot).copied().unwrap_or(1.0),
            }
        };
        (0..self.slot_count()).map(of).collect()
    }
}

fn is_rate(value: &f64) -> bool {
    value.is_finite() && *value >= 0.0
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Seconds from now to its begin.
    after_s: f64,
    span_s: f64,
    price: f64,
}

/// One course, ready to be played.
#[derive(Debug)]
struct Play<'a> {
    slots: &'a [Slot],
    stretches: Vec<Stretch>,
    whole: f64,
    /// Cost of a second that all waits.
    second: f64,
    /// What is left at each slot if nothing is sent before.
    unsent: Vec<f64>,
}

/// What comes of one start in one course.
#[derive(Debug, Clone, Copy)]
struct Played {
    cost: f64,
    /// When all has crossed, in seconds from now; nothing if that is too late.
    ends_s: Option<f64>,
}

impl<'a> Play<'a> {
    fn new(crossing: &Crossing, course: &Course, slots: &'a [Slot]) -> Self {
        let whole = crossing.whole_mib;
        let stretch = |(slot, of): (usize, &Slot)| {
            let rate = course.link_mib_s[slot];
            let enough = rate * crossing.pause_s;
            Stretch::new(whole, rate, course.dirty_mib_s[slot], of.span_s, enough)
        };
        let stretches: Vec<Stretch> = slots.iter().enumerate().map(stretch).collect();
        let mut unsent = Vec::with_capacity(slots.len());
        let mut left = crossing.left_mib;
        for stretch in &stretches {
            unsent.push(left);
            left = stretch.hold(left);
        }
        Self { slots, stretches, whole, second: crossing.haste * whole / 3600.0, unsent }
    }

    /// Sent in the slot `first`, and then in each in which at least the share `useful` of what crosses is not
    /// spoiled meanwhile.
    fn from(&self, first: usize, useful: f64) -> Played {
        let mut left = self.unsent[first];
        let mut cost = self.slots[first].after_s * self.second;
        for (slot, stretch) in self.stretches.iter().enumerate().skip(first) {
            let Slot { after_s, span_s, price } = self.slots[slot];
            if price == f64::INFINITY || (slot > first && stretch.useful(left) < useful) {
                cost += span_s * self.second;
                left = stretch.hold(left);
                continue;
            }
            match stretch.send(left) {
                Step::Ends { took_s, mib } => {
                    cost += mib * price + took_s * self.second;
                    return Played { cost, ends_s: Some(after_s + took_s) };
                }
                Step::Left(after) => {
                    cost += stretch.mib() * price + span_s * self.second;
                    left = after;
                }
            }
        }
        Played { cost: cost + self.whole * LATE + left * LATE_LEFT, ends_s: None }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SLOT: u32 = 300;

    /// 6,000 MiB over 10 MiB/s: ten minutes if nothing changes.
    fn crossing(link: &[f64], dirty: &[f64]) -> Crossing {
        Crossing {
            name: "db1".into(),
            whole_mib: 6000.0,
            left_mib: 6000.0,
            courses: vec![Course { link_mib_s: link.to_vec(), dirty_mib_s: dirty.to_vec() }],
            price: Vec::new(),
            slots_from_s: 0,
            slot_s: SLOT,
            deadline_s: i64::from(SLOT) * link.len() as i64,
            pause_s: 0.3,
            haste: 0.001,
            in_parts: false,
            has_begun: false,
        }
    }

    /// Busy in the first four of twelve slots.
    const BUSY: [f64; 12] = [9.0, 9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];

    #[test]
    fn where_no_hour_is_better_it_sends_at_once() {
        let advice = advise(&crossing(&[10.0; 12], &[0.0; 12]), 100).unwrap();
        assert!(advice.sends && advice.starts_s == Some(100), "{advice:?}");
        assert_eq!((advice.ends_s, advice.in_time), (Some(700), 1.0));
        assert!((advice.now_mib - 6000.0).abs() < 10.0, "{advice:?}");
    }

    #[test]
    fn a_busy_guest_is_waited_for_and_the_deadline_is_not_missed_for_it() {
        let mut wait = crossing(&[10.0; 12], &BUSY);
        let advice = advise(&wait, 0).unwrap();
        assert!(!advice.sends && advice.now_mib > advice.later_mib, "{advice:?}");
        assert_eq!((advice.starts_s, advice.ends_s), (Some(1200), Some(1800)));
        // Quiet in the second half only, and there is half an hour.
        wait.deadline_s = 1900;
        assert_eq!(advise(&wait, 0).unwrap().starts_s, Some(1200));
        wait.courses[0].dirty_mib_s = vec![5.0; 12];
        wait.deadline_s = 1000;
        let advice = advise(&wait, 0).unwrap();
        assert!(advice.sends && advice.in_time == 1.0, "{advice:?}");
    }

    #[test]
    fn in_parts_it_stops_while_the_guest_outruns_the_link() {
        let mut dirty = [0.0; 12];
        dirty[1..6].fill(12.0);
        let mut parts = crossing(&[10.0; 12], &dirty);
        (parts.in_parts, parts.has_begun, parts.left_mib) = (true, true, 1000.0);
        parts.slots_from_s = 300;
        let Course { link_mib_s, dirty_mib_s } = &mut parts.courses[0];
        link_mib_s.remove(0);
        dirty_mib_s.remove(0);
        let advice = advise(&parts, 300).unwrap();
        assert!(!advice.sends && advice.ends_s.is_some(), "{advice:?}");
        parts.in_parts = false;
        assert!(advise(&parts, 300).unwrap().sends);
    }

    #[test]
    fn it_sends_where_it_may_and_where_it_is_cheap() {
        let mut priced = crossing(&[10.0; 12], &[0.0; 12]);
        priced.price = vec![f64::INFINITY; 4];
        priced.price.extend([3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]);
        let advice = advise(&priced, 0).unwrap();
        assert!(!advice.sends && advice.now_mib == f64::INFINITY, "{advice:?}");
        assert_eq!(advice.starts_s, Some(2400));
        priced.price = vec![f64::INFINITY; 12];
        let never = advise(&priced, 0).unwrap();
        assert_eq!((never.sends, never.in_time, never.starts_s), (false, 0.0, None));
    }

    #[test]
    fn what_may_go_wrong_in_a_course_counts_by_its_share() {
        let mut courses = crossing(&[10.0; 12], &BUSY);
        // Nine days of ten are quiet now; on one the guest outruns the link later.
        let quiet = Course { link_mib_s: vec![10.0; 12], dirty_mib_s: vec![1.0; 12] };
        let mut later = quiet.clone();
        later.dirty_mib_s[3..].fill(30.0);
        courses.courses = vec![quiet; 9];
        courses.courses.push(later);
        let advice = advise(&courses, 0).unwrap();
        assert!(advice.sends && advice.in_time == 1.0, "{advice:?}");
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let good = crossing(&[10.0; 12], &[0.0; 12]);
        let bad: [fn(&mut Crossing); 8] = [
            |one| one.whole_mib = f64::NAN,
            |one| one.left_mib = 7000.0,
            |one| one.courses.clear(),
            |one| one.slot_s = 0,
            |one| one.slots_from_s = i64::MAX,
            |one| one.deadline_s = 1 << 40,
            |one| one.courses[0].dirty_mib_s[3] = -1.0,
            |one| one.price = vec![1.0; 3],
        ];
        for (at, bad) in bad.iter().enumerate() {
            let mut one = good.clone();
            bad(&mut one);
            assert!(advise(&one, 0).is_err(), "{at}");
        }
        assert!(advise(&good, 300).is_err() && advise(&good, 0).is_ok());
        let mut late = good;
        late.deadline_s = -5;
        assert_eq!(advise(&late, 0).unwrap().in_time, 0.0);
    }

    proptest! {
        #[test]
        fn whoever_follows_it_with_the_truth_is_no_worse_off_than_at_once(
            link in prop::collection::vec(1.0..50.0_f64, 12),
            dirty in prop::collection::vec(0.0..30.0_f64, 12),
            whole in 100.0..10_000.0_f64,
            in_parts: bool,
        ) {
            let mut one = crossing(&link, &dirty);
            (one.whole_mib, one.left_mib, one.in_parts) = (whole, whole, in_parts);
            let advice = advise(&one, 0).unwrap();
            let (now, better) = (advice.now_mib, advice.cost_mib);
            prop_assert!(better <= now, "{advice:?}");
            if advice.in_time == 1.0 {
                // To arrive takes at least all there is.
                prop_assert!(better >= whole * 0.95, "{advice:?}");
            }
        }
    }
}
