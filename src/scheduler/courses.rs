//! What a VM may change from now on: as after those moments of its last days that were most like now.
//!
//! Invariant: nothing but what was seen up to now goes in; a slot in which nothing was seen is no zero, and
//! a moment after which hardly anything was seen is no course.
//!
//! Alike are two moments before which a VM changed about as much in the last half hour and in the last two hours,
//! and a little more so if it was about the same time of day. So a guest that follows the day is expected
//! to go on with it, and one that is busy for hours at random to go on being so for a while; neither need
//! be told apart. (Analog forecasts: E. Lorenz, Journal of the Atmospheric Sciences 26, 1969.)

/// Days that are looked back.
const DAYS: usize = 14;
/// Courses, at most.
const COURSES: usize = 16;
/// Moments of a day that are looked at, and how many of them make the longer of the two pasts.
const MOMENTS: usize = 48;
const LONG: usize = 4;
/// Moments just before now are too much the same to tell anything.
const NEWEST: usize = 12;
/// How much an hour of the day counts against a past that differs by the VM's usual deviation.
const HOUR: f64 = 0.1;
/// Least deviation that counts, as a share of the mean.
const SPREAD_MIN: f64 = 0.2;
/// Hours in which the difference to now fades.
const FADES: f64 = 1.0;
/// Share of a course that must have been seen.
const SEEN_MIN: f64 = 0.9;

/// Up to sixteen series of `slots` values, each as likely as the others. `seen` is up to now, the newest
/// last, `per_day` values a day, not a number where nothing was seen. Empty if less than a day was seen.
pub fn like_now(seen: &[f64], per_day: usize, slots: usize) -> Vec<Vec<f64>> {
    let step = (per_day / MOMENTS).max(1);
    let seen = &seen[seen.len().saturating_sub(DAYS * per_day)..];
    let Some(here) = past(seen, seen.len(), step) else { return Vec::new() };
    if seen.iter().filter(|value| value.is_finite()).count() < per_day {
        return Vec::new();
    }
    let level = mean(seen).unwrap_or(0.0);
    let deviations: Vec<f64> = seen.iter().map(|value| (value - level).abs()).collect();
    let spread = mean(&deviations).unwrap_or(0.0).max(level * SPREAD_MIN).max(f64::MIN_POSITIVE);
    let mut alike: Vec<(f64, usize, [f64; 2])> = (NEWEST..)
        .map(|back| back * step)
        .take_while(|back| *back <= seen.len())
        .filter_map(|back| {
            let then = seen.len() - back;
            let there = past(seen, then, step)?;
            let apart = (here[0] - there[0]).abs() + (here[1] - there[1]).abs();
            let off = (back % per_day).min(per_day - back % per_day) as f64;
            Some((apart / spread + HOUR * off / per_day as f64 * 24.0, then, there))
        })
        .collect();
    alike.sort_by(|one, other| one.0.total_cmp(&other.0));
    let courses = alike.iter().filter_map(|(_, then, there)| {
        let known = seen[*then..].iter().filter(|value| value.is_finite()).count();
        if (known as f64) < (seen.len() - then) as f64 * SEEN_MIN {
            return None;
        }
        Some(course(seen, per_day, slots, *then, here[0] - there[0]))
    });
    courses.take(COURSES).collect()
}

/// What came after `then`, moved by `change`, which fades; what has not come yet is as whole days before.
fn course(seen: &[f64], per_day: usize, slots: usize, then: usize, change: f64) -> Vec<f64> {
    let fades = FADES * per_day as f64 / 24.0;
    let mut last = 0.0;
    (0..slots)
        .map(|ahead| {
            let days = (then + ahead + per_day).saturating_sub(seen.len()) / per_day;
            let value = (then + ahead).checked_sub(days * per_day).and_then(|at| seen.get(at));
            last = value.copied().filter(|value| value.is_finite()).unwrap_or(last);
            (last + change * (-(ahead as f64) / fades).exp()).max(0.0)
        })
        .collect()
}

/// The means of the two pasts of a moment; nothing if neither was seen.
fn past(seen: &[f64], at: usize, step: usize) -> Option<[f64; 2]> {
    let long = at.checked_sub(step * LONG)?;
    Some([mean(&seen[at - step..at])?, mean(&seen[long..at])?])
}

fn mean(values: &[f64]) -> Option<f64> {
    let seen = values.iter().filter(|value| value.is_finite());
    let (sum, count) = seen.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: usize = 48;

    /// Busy from 18:00 to 24:00 of each day.
    fn evenings(days: usize) -> Vec<f64> {
        (0..days * DAY).map(|slot| if slot % DAY >= 36 { 8.0 } else { 1.0 }).collect()
    }

    #[test]
    fn who_follows_the_day_is_expected_to_go_on_with_it() {
        // At noon.
        let seen = &evenings(8)[..7 * DAY + 24];
        let courses = like_now(seen, DAY, DAY);
        assert_eq!(courses.len(), COURSES);
        let mean_at = |slot: usize| {
            courses.iter().map(|course| course[slot]).sum::<f64>() / courses.len() as f64
        };
        assert!(mean_at(0) < 1.1 && mean_at(18) > 6.0 && mean_at(30) < 2.0, "{courses:?}");
    }

    #[test]
    fn who_is_busy_at_random_is_expected_to_stay_so_for_a_while() {
        // Busy for nine hours, quiet for twenty: no day is like another.
        let seen: Vec<f64> =
            (0..14 * DAY).map(|slot| if slot % 58 < 18 { 8.0 } else { 1.0 }).collect();
        let from = seen.len() - (seen.len() % 58) + 6 - 58;
        let courses = like_now(&seen[..from], DAY, 20);
        let after_an_hour = courses.iter().map(|course| course[1]).sum::<f64>();
        assert!(after_an_hour / courses.len() as f64 > 5.0, "{courses:?}");
    }

    #[test]
    fn the_level_of_just_now_fades() {
        let mut seen = evenings(3);
        let now = seen.len() - 24;
        seen.truncate(now);
        seen[now - 1] = 3.0;
        for course in like_now(&seen, DAY, 12) {
            assert!(course[0] > 2.0 && course[3] < 1.6, "{course:?}");
        }
    }

    #[test]
    fn what_was_not_seen_is_no_zero_and_too_little_is_nothing() {
        let mut seen = evenings(3);
        assert!(like_now(&seen[..DAY - 1], DAY, 10).is_empty());
        assert!(like_now(&[], DAY, 10).is_empty());
        seen[10..30].fill(f64::NAN);
        seen[70] = f64::NAN;
        let courses = like_now(&seen, DAY, DAY);
        assert!(!courses.is_empty() && courses.iter().flatten().all(|value| *value >= 0.5));
        seen.fill(f64::NAN);
        assert!(like_now(&seen, DAY, 10).is_empty());
    }

    #[test]
    fn further_ahead_days_repeat() {
        for course in like_now(&evenings(2), DAY, 5 * DAY) {
            assert_eq!(course.len(), 5 * DAY);
            assert_eq!(course[3 * DAY..4 * DAY], course[4 * DAY..]);
        }
    }
}
