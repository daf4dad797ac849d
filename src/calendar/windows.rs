//! Times at which something may happen: `mon-fri 22:00-06:00; sat,sun`.
//!
//! Invariant: the times are those of a [`RateCalendar`], with its rules for days, midnights and clocks
//! that are changed; here a moment is in one of them or it is not.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use longhaul_transport::BitRate;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::text::parse_window;
use super::{ALL_DAYS, CalendarError, DAY, RateCalendar, Window};

/// What holds outside of all windows, in the calendar behind them. Nothing is sent at this rate.
const CLOSED: BitRate = BitRate::from_bits_per_second(1);

/// Windows of the day, the week or both; printed, they read back to the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows(RateCalendar);

/// Whether a moment is in a window, and until when that stays so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// It is in one.
    pub is_open: bool,
    /// When that changes; none if it never does.
    pub until: Option<Timestamp>,
}

impl Windows {
    /// Every moment of every day.
    pub fn always() -> Self {
        let all_day = Window { days: ALL_DAYS, from: 0, until: DAY, rate: None };
        Self(RateCalendar { windows: vec![all_day], otherwise: Some(CLOSED) })
    }

    /// What holds at `now` where clocks show the time of `zone`.
    pub fn at(&self, now: Timestamp, zone: &TimeZone) -> Opening {
        let held = self.0.at(now, zone);
        Opening { is_open: held.rate.is_none(), until: held.next.map(|(at, _)| at) }
    }
}

impl FromStr for Windows {
    type Err = CalendarError;

    fn from_str(text: &str) -> Result<Self, CalendarError> {
        if text.contains('=') {
            return Err(CalendarError::Time(text.chars().take(40).collect()));
        }
        let windows = text.split(';').map(|when| parse_window(when.trim(), None));
        let windows = windows.collect::<Result<Vec<_>, _>>()?;
        Ok(Self(RateCalendar { windows, otherwise: Some(CLOSED) }))
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, window) in self.0.windows.iter().enumerate() {
            let text = window.to_string();
            let when = text.split('=').next().unwrap_or_default();
            write!(f, "{}{when}", if at == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl Serialize for Windows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Windows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(windows: &str, moment: &str) -> Opening {
        let windows: Windows = windows.parse().unwrap();
        assert_eq!(windows.to_string().parse::<Windows>().unwrap(), windows);
        windows.at(moment.parse().unwrap(), &TimeZone::UTC)
    }

    #[test]
    fn a_moment_is_in_a_window_or_not() {
        // 3 August 2026 is a Monday.
        let night = at("22:00-06:00", "2026-08-03T23:00:00Z");
        assert_eq!((night.is_open, night.until), (true, "2026-08-04T06:00:00Z".parse().ok()));
        let day = at("22:00-06:00", "2026-08-03T06:00:00Z");
        assert_eq!((day.is_open, day.until), (false, "2026-08-03T22:00:00Z".parse().ok()));
        let weekend = at("mon-fri 22:00-06:00; sat,sun", "2026-08-08T12:00:00Z");
        assert!(weekend.is_open);
        let brief = at("12:00:30-12:00:45", "2026-08-03T12:00:40Z");
        assert_eq!((brief.is_open, brief.until), (true, "2026-08-03T12:00:45Z".parse().ok()));
        assert_eq!(at("00:00-24:00", "2026-08-03T12:00:40Z").until, None);
    }

    #[test]
    fn what_is_no_window_is_refused() {
        for wrong in ["", ";", "soon", "22:00", "22:00-22:00", "22:00-06:00=20M", "12:00:61-13:00"]
        {
            assert!(wrong.parse::<Windows>().is_err(), "{wrong}");
        }
    }
}
