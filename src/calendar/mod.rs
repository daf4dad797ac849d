//! Caps that follow the clock: `mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M`.
//!
//! Invariant: nothing here reads a clock. What holds follows from what a clock on the wall of the time
//! zone shows, and from nothing else: the first window that has the moment in it decides. So in the
//! night in which clocks go back, a window of the hour that is there twice holds twice, and one of the
//! hour that is left out in spring does not hold.

mod text;
mod windows;

use std::collections::BTreeSet;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use longhaul_transport::BitRate;

pub use text::{CalendarError, cap_text};
pub use windows::{Opening, Windows};

/// Seconds of a day.
const DAY: u32 = 24 * 60 * 60;
/// Every day of the week.
const ALL_DAYS: u8 = 0x7f;
/// Days ahead in which every window has begun and ended at least once.
const DAYS_AHEAD: i64 = 8;

/// A cap for every moment; printed, it reads back to the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateCalendar {
    windows: Vec<Window>,
    /// What holds outside of all windows.
    otherwise: Option<BitRate>,
}

/// A time of some days of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    /// One bit a day, Monday the lowest: the days on which it begins.
    days: u8,
    /// Second of the day at which it begins.
    from: u32,
    /// Second of the day at which it has ended; of the day after if that is not after `from`.
    until: u32,
    rate: Option<BitRate>,
}

/// What holds at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The cap; none if there is none.
    pub rate: Option<BitRate>,
    /// When another cap comes, and which; none if this one stays.
    pub next: Option<(Timestamp, Option<BitRate>)>,
}

impl Window {
    fn has(&self, local: DateTime) -> bool {
        let [hour, minute, second] = [local.hour(), local.minute(), local.second()]
            .map(|part| u32::from(part.unsigned_abs()));
        let now = (hour * 60 + minute) * 60 + second;
        let today = local.date().weekday().to_monday_zero_offset().unsigned_abs();
        let begins = |day: u8| self.days & (1 << day) != 0;
        if self.from < self.until {
            return begins(today) && (self.from..self.until).contains(&now);
        }
        let yesterday = (today + 6) % 7;
        (begins(today) && now >= self.from) || (begins(yesterday) && now < self.until)
    }
}

impl RateCalendar {
    /// The same cap at every moment; none at all for `None`.
    pub fn always(rate: Option<BitRate>) -> Self {
        Self { windows: Vec::new(), otherwise: rate }
    }

    /// What holds at `now` where clocks show the time of `zone`.
    pub fn at(&self, now: Timestamp, zone: &TimeZone) -> Held {
        let rate_at = |moment| self.rate_at(zone.to_datetime(moment));
        let rate = rate_at(now);
        let mut moments = self.moments(now, zone);
        moments.sort();
        let later = moments.into_iter().filter(|moment| *moment > now);
        let mut changes = later.map(|moment| (moment, rate_at(moment)));
        Held { rate, next: changes.find(|(_, other)| *other != rate) }
    }

    fn rate_at(&self, local: DateTime) -> Option<BitRate> {
        let window = self.windows.iter().find(|window| window.has(local));
        window.map_or(self.otherwise, |window| window.rate)
    }

    /// The moments of the days ahead at which something may change: where windows begin and end, and
    /// where the clocks of the zone are changed.
    fn moments(&self, now: Timestamp, zone: &TimeZone) -> Vec<Timestamp> {
        let seconds: BTreeSet<u32> =
            self.windows.iter().flat_map(|window| [window.from, window.until]).collect();
        let midnight = zone.to_datetime(now).date().at(0, 0, 0, 0);
        let mut moments = Vec::new();
        for day in 0..=DAYS_AHEAD {
            for second in &seconds {
                let Ok(local) = midnight.checked_add(day.days().seconds(*second)) else { continue };
                // A time that is there twice is two moments; one that is left out makes no difference.
                let either = zone.to_ambiguous_timestamp(local);
                moments.extend([either.earlier(), either.later()].into_iter().flatten());
            }
        }
        let last = moments.iter().max().copied().unwrap_or(now);
        let changes = zone.following(now).map(|change| change.timestamp());
        moments.extend(changes.take_while(|change| *change <= last));
        moments
    }
}

#[cfg(test)]
mod tests;
