//! Calendars as operators write them.
//!
//! ```text
//! calendar = cap | { [days] [time-time] "=" cap "," } "else=" cap
//! time     = HH:MM[:SS]
//! days     = day | day "-" day, separated by commas       day = mon .. sun
//! cap      = bits per second (20M) | "unlimited"
//! ```
//! Invariant: what is printed is the shortest text that reads back to the same calendar.

use std::fmt;
use std::str::FromStr;

use longhaul_transport::{BitRate, ParseBitRateError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::{ALL_DAYS, DAY, RateCalendar, Window};

/// Longest text that is looked at.
const TEXT_MAX: usize = 1000;
/// Most of a text that an error repeats.
const SHOWN_MAX: usize = 40;
/// A packet then takes a fifth of a second; much slower, peers would be taken for gone.
const RATE_MIN: BitRate = BitRate::from_bits_per_second(64_000);
const NO_CAP: &str = "unlimited";
const OTHERWISE: &str = "else";
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Why a text is no calendar.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CalendarError {
    /// A cap in it is none.
    #[error(transparent)]
    Rate(#[from] ParseBitRateError),
    /// Too little to keep a connection alive.
    #[error(
        "{0} bits per second would end every connection: write at least {RATE_MIN} (20M is 20 Mbit/s)"
    )]
    TooSlow(BitRate),
    /// It names no time that is known.
    #[error(
        "{0:?} is no time: write as in 08:00-20:00=20M, mon-fri 08:00-20:00=20M or sat,sun=20M"
    )]
    Time(String),
    /// A window that begins when it ends.
    #[error("{0:?} ends when it begins: for a whole day write the days alone, or 00:00-24:00")]
    Empty(String),
    /// Between the windows nothing is said.
    #[error("what holds at other times? end with else=200M or else=unlimited")]
    NoElse,
    /// Something stands behind `else`.
    #[error("{0:?} never holds: else has to come last, and once")]
    AfterElse(String),
    /// Longer than anybody writes.
    #[error("a calendar has at most {TEXT_MAX} characters")]
    TooLong,
}

fn shown(text: &str) -> String {
    text.trim().chars().take(SHOWN_MAX).collect()
}

impl FromStr for RateCalendar {
    type Err = CalendarError;

    fn from_str(text: &str) -> Result<Self, CalendarError> {
        if text.len() > TEXT_MAX {
            return Err(CalendarError::TooLong);
        }
        if !text.contains('=') {
            return parse_cap(text).map(Self::always);
        }
        let (mut windows, mut otherwise) = (Vec::new(), None);
        // Days are separated by commas too: what has no `=` belongs to what follows.
        let mut when = String::new();
        for part in text.split(',') {
            if otherwise.is_some() {
                return Err(CalendarError::AfterElse(shown(part)));
            }
            let (words, cap) = part.split_once('=').map_or((part, None), |(w, cap)| (w, Some(cap)));
            when += words.trim();
            let Some(cap) = cap else {
                when.push(',');
                continue;
            };
            let rate = parse_cap(cap)?;
            if when.eq_ignore_ascii_case(OTHERWISE) {
                otherwise = Some(rate);
            } else {
                windows.push(parse_window(&when, rate)?);
            }
            when.clear();
        }
        match otherwise {
            Some(otherwise) if when.is_empty() => Ok(Self { windows, otherwise }),
            Some(_) => Err(CalendarError::AfterElse(shown(&when))),
            None if when.is_empty() => Err(CalendarError::NoElse),
            None => Err(CalendarError::Time(shown(&when))),
        }
    }
}

fn parse_cap(text: &str) -> Result<Option<BitRate>, CalendarError> {
    if text.trim().eq_ignore_ascii_case(NO_CAP) {
        return Ok(None);
    }
    let rate: BitRate = text.parse()?;
    if rate < RATE_MIN {
        return Err(CalendarError::TooSlow(rate));
    }
    Ok(Some(rate))
}

pub(super) fn parse_window(when: &str, rate: Option<BitRate>) -> Result<Window, CalendarError> {
    let wrong = || CalendarError::Time(shown(when));
    let mut words = when.split_whitespace().peekable();
    let days = match words.next_if(|word| !word.contains(':')) {
        Some(word) => parse_days(word).ok_or_else(wrong)?,
        None => ALL_DAYS,
    };
    let (from, until) = match words.next() {
        Some(word) => parse_hours(word).ok_or_else(wrong)?,
        // Neither days nor hours: nothing was written.
        None if when.trim().is_empty() => return Err(wrong()),
        None => (0, DAY),
    };
    if words.next().is_some() {
        return Err(wrong());
    }
    if from == until {
        return Err(CalendarError::Empty(shown(when)));
    }
    Ok(Window { days, from, until, rate })
}

fn parse_days(text: &str) -> Option<u8> {
    let place = |name: &str| DAYS.iter().position(|day| day.eq_ignore_ascii_case(name));
    let mut days = 0;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (place(first)?, place(last)?);
        // A range may go over the end of the week.
        let length = (last + DAYS.len() - first) % DAYS.len();
        days |= (first..=first + length).fold(0, |days, day| days | 1 << (day % DAYS.len()));
    }
    Some(days)
}

/// Seconds of the day; midnight at the end is that of the same day.
fn parse_hours(text: &str) -> Option<(u32, u32)> {
    let second = |text: &str| {
        let mut parts = text.split(':');
        let mut next = |lengths: std::ops::RangeInclusive<usize>| {
            let part = parts.next()?;
            let is_number = part.bytes().all(|byte| byte.is_ascii_digit());
            (is_number && lengths.contains(&part.len())).then(|| part.parse::<u32>().ok())?
        };
        let (hours, minutes) = (next(1..=2)?, next(2..=2)?);
        let seconds = if text.matches(':').count() == 2 { next(2..=2)? } else { 0 };
        let at = (hours * 60 + minutes) * 60 + seconds;
        (parts.next().is_none() && minutes < 60 && seconds < 60 && at <= DAY).then_some(at)
    };
    let (from, until) = text.split_once('-')?;
    match (second(from)?, second(until)?) {
        (DAY, _) => None,
        (from, 0) if from > 0 => Some((from, DAY)),
        hours => Some(hours),
    }
}

/// A cap in words: its rate, or `unlimited`.
pub fn cap_text(rate: Option<BitRate>) -> String {
    rate.map_or_else(|| NO_CAP.to_owned(), |rate| rate.to_string())
}

impl fmt::Display for RateCalendar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for window in &self.windows {
            write!(f, "{window}, ")?;
        }
        if !self.windows.is_empty() {
            write!(f, "{OTHERWISE}=")?;
        }
        f.write_str(&cap_text(self.otherwise))
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { days, from, until, rate } = *self;
        let whole_day = (from, until) == (0, DAY);
        if days != ALL_DAYS {
            f.write_str(&days_text(days))?;
        }
        if days != ALL_DAYS && !whole_day {
            f.write_str(" ")?;
        }
        if days == ALL_DAYS || !whole_day {
            write!(f, "{}-{}", clock(from), clock(until))?;
        }
        write!(f, "={}", cap_text(rate))
    }
}

/// `08:00`, with seconds where there are some.
fn clock(at: u32) -> String {
    let (hours, minutes, seconds) = (at / 3600, at / 60 % 60, at % 60);
    let seconds = if seconds == 0 { String::new() } else { format!(":{seconds:02}") };
    format!("{hours:02}:{minutes:02}{seconds}")
}

/// `mon-fri`, `sat,sun`: three days in a row and more are a range.
fn days_text(days: u8) -> String {
    let has = |day: usize| day < DAYS.len() && days & (1 << day) != 0;
    let mut parts = Vec::new();
    let mut day = 0;
    while day < DAYS.len() {
        let length = (day..).take_while(|day| has(*day)).count();
        match length {
            0..=2 => parts.extend(DAYS[day..day + length].iter().map(|name| (*name).to_owned())),
            _ => parts.push(format!("{}-{}", DAYS[day], DAYS[day + length - 1])),
        }
        day += length.max(1);
    }
    parts.join(",")
}

impl Serialize for RateCalendar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RateCalendar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
