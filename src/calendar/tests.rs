//! Calendars as they are written, and what they say over nights, weeks and changes of the clock.

use proptest::prelude::*;

use super::*;

fn calendar(text: &str) -> RateCalendar {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Central European time, without a database of zones.
fn europe() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn moment(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// What holds, as `cap` or `cap until moment: cap`.
fn held(text: &str, now: &str, zone: &TimeZone) -> String {
    let Held { rate, next } = calendar(text).at(moment(now), zone);
    match next {
        Some((at, then)) => format!("{} until {at}: {}", cap_text(rate), cap_text(then)),
        None => cap_text(rate),
    }
}

#[test]
fn what_operators_write_is_read_and_printed_the_shortest_way() {
    for (written, printed) in [
        ("20M", "20M"),
        (" Unlimited ", "unlimited"),
        ("08:00-20:00=20M, else=200M", "08:00-20:00=20M, else=200M"),
        ("08:00-20:00=20M,ELSE = 0.2G", "08:00-20:00=20M, else=200M"),
        (
            "mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M",
            "mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M",
        ),
        ("Sat, Sun 22:00-06:00 = 1M, else=2M", "sat,sun 22:00-06:00=1M, else=2M"),
        ("sat-mon=1M, else=2M", "mon,sat,sun=1M, else=2M"),
        ("fri-wed=1M, else=2M", "mon-wed,fri-sun=1M, else=2M"),
        ("mon-sun=1M, else=2M", "00:00-24:00=1M, else=2M"),
        ("20:00-00:00=1M, else=2M", "20:00-24:00=1M, else=2M"),
        ("mon 00:00-24:00=1M, else=2M", "mon=1M, else=2M"),
        ("8:00-9:30=1M, else=2M", "08:00-09:30=1M, else=2M"),
        ("else=2M", "2M"),
    ] {
        let read = calendar(written);
        assert_eq!(read.to_string(), printed, "{written}");
        assert_eq!(calendar(printed), read, "{written}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_what_to_write() {
    for (text, expected) in [
        ("", "is no rate"),
        ("fast", "is no rate"),
        ("0M", "zero"),
        ("20", "20 bits per second would end every connection: write at least 64k"),
        ("08:00-20:00=20M", "end with else"),
        ("08:00-20:00=20M, else=fast", "\"fast\" is no rate"),
        ("8-20=20M, else=1M", "\"8-20\" is no time"),
        ("08:0-20:00=20M, else=1M", "\"08:0-20:00\" is no time"),
        ("08:00-25:00=20M, else=1M", "is no time"),
        ("24:00-08:00=20M, else=1M", "is no time"),
        ("08:60-09:00=20M, else=1M", "is no time"),
        ("+1:00-09:00=20M, else=1M", "is no time"),
        ("funday=20M, else=1M", "\"funday\" is no time"),
        ("mon tue=20M, else=1M", "is no time"),
        ("mon 08:00-09:00 10:00-11:00=20M, else=1M", "is no time"),
        ("=20M, else=1M", "is no time"),
        ("08:00-08:00=20M, else=1M", "ends when it begins"),
        ("else=1M, mon=2M", "\"mon=2M\" never holds"),
        ("else=1M, else=2M", "never holds"),
        ("else=1M,", "never holds"),
        ("mon=1M, tue", "\"tue,\" is no time"),
    ] {
        let error = text.parse::<RateCalendar>().unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?} gave {error:?}");
    }
    let long = "mon=1M, ".repeat(200) + "else=1M";
    assert_eq!(long.parse::<RateCalendar>(), Err(CalendarError::TooLong));
}

#[test]
fn one_cap_never_changes() {
    assert_eq!(held("20M", "2026-08-03T06:00:00Z", &europe()), "20M");
    assert_eq!(RateCalendar::always(None), calendar("unlimited"));
    assert_eq!(held("mon=20M, else=20M", "2026-08-03T06:00:00Z", &europe()), "20M");
}

#[test]
fn a_day_has_its_hours() {
    let text = "08:00-20:00=20M, else=200M";
    // A Monday in summer: two hours ahead of UTC.
    for (now, expected) in [
        ("2026-08-03T05:59:59Z", "200M until 2026-08-03T06:00:00Z: 20M"),
        ("2026-08-03T06:00:00Z", "20M until 2026-08-03T18:00:00Z: 200M"),
        ("2026-08-03T17:59:59.999Z", "20M until 2026-08-03T18:00:00Z: 200M"),
        ("2026-08-03T18:00:00Z", "200M until 2026-08-04T06:00:00Z: 20M"),
    ] {
        assert_eq!(held(text, now, &europe()), expected, "{now}");
    }
}

#[test]
fn a_week_has_its_days_and_the_first_window_decides() {
    let text = "mon 09:00-10:00=1M, mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M";
    for (now, expected) in [
        ("2026-08-03T07:00:00Z", "1M until 2026-08-03T08:00:00Z: 20M"),
        ("2026-08-04T07:00:00Z", "20M until 2026-08-04T18:00:00Z: 200M"),
        ("2026-08-07T19:00:00Z", "200M until 2026-08-07T22:00:00Z: unlimited"),
        ("2026-08-08T12:00:00Z", "unlimited until 2026-08-09T22:00:00Z: 200M"),
    ] {
        assert_eq!(held(text, now, &europe()), expected, "{now}");
    }
    // Nothing else for a whole week.
    let once = held("wed 00:00-00:01=1M, else=2M", "2026-08-04T22:01:00Z", &europe());
    assert_eq!(once, "2M until 2026-08-11T22:00:00Z: 1M");
}

#[test]
fn a_night_belongs_to_the_day_on_which_it_begins() {
    let text = "fri 22:00-06:00=1M, else=2M";
    for (now, expected) in [
        ("2026-08-07T19:59:00Z", "2M until 2026-08-07T20:00:00Z: 1M"),
        ("2026-08-07T22:30:00Z", "1M until 2026-08-08T04:00:00Z: 2M"),
        ("2026-08-08T20:30:00Z", "2M until 2026-08-14T20:00:00Z: 1M"),
        ("2026-08-07T02:00:00Z", "2M until 2026-08-07T20:00:00Z: 1M"),
    ] {
        assert_eq!(held(text, now, &europe()), expected, "{now}");
    }
    let over_the_week = held("sun 22:00-06:00=1M, else=2M", "2026-08-10T03:00:00Z", &europe());
    assert_eq!(over_the_week, "1M until 2026-08-10T04:00:00Z: 2M");
}

#[test]
fn in_spring_an_hour_is_left_out() {
    // 29 March 2026: at 01:00 UTC the clock goes from 02:00 to 03:00.
    let zone = europe();
    let before = "2026-03-29T00:30:00Z";
    let daily = held("08:00-20:00=20M, else=200M", before, &zone);
    assert_eq!(daily, "200M until 2026-03-29T06:00:00Z: 20M");
    let begins_in_it = held("02:30-04:00=1M, else=2M", before, &zone);
    assert_eq!(begins_in_it, "2M until 2026-03-29T01:00:00Z: 1M");
    let ends_in_it = held("01:00-02:30=1M, else=2M", before, &zone);
    assert_eq!(ends_in_it, "1M until 2026-03-29T01:00:00Z: 2M");
    let is_in_it = held("02:10-02:50=1M, else=2M", before, &zone);
    assert_eq!(is_in_it, "2M until 2026-03-30T00:10:00Z: 1M");
}

#[test]
fn in_autumn_an_hour_is_there_twice() {
    // 25 October 2026: at 01:00 UTC the clock goes from 03:00 back to 02:00.
    let zone = europe();
    let daily = held("08:00-20:00=20M, else=200M", "2026-10-24T18:00:00Z", &zone);
    assert_eq!(daily, "200M until 2026-10-25T07:00:00Z: 20M");
    let twice = "02:10-02:50=1M, else=2M";
    for (now, expected) in [
        ("2026-10-25T00:00:00Z", "2M until 2026-10-25T00:10:00Z: 1M"),
        ("2026-10-25T00:10:00Z", "1M until 2026-10-25T00:50:00Z: 2M"),
        ("2026-10-25T00:50:00Z", "2M until 2026-10-25T01:10:00Z: 1M"),
        ("2026-10-25T01:10:00Z", "1M until 2026-10-25T01:50:00Z: 2M"),
        ("2026-10-25T01:50:00Z", "2M until 2026-10-26T01:10:00Z: 1M"),
    ] {
        assert_eq!(held(twice, now, &zone), expected, "{now}");
    }
    // The clock that goes back takes a window that had begun with it.
    let from_half = held("02:30-05:00=1M, else=2M", "2026-10-25T00:30:00Z", &zone);
    assert_eq!(from_half, "1M until 2026-10-25T01:00:00Z: 2M");
}

#[test]
fn the_ends_of_time_are_no_trouble() {
    for now in [Timestamp::MIN, Timestamp::MAX] {
        calendar("mon 08:00-20:00=1M, else=2M").at(now, &TimeZone::UTC);
        calendar("mon 08:00-20:00=1M, else=2M").at(now, &europe());
    }
}

fn any_rate() -> impl Strategy<Value = Option<BitRate>> {
    prop::option::of((64_000u64..1 << 40).prop_map(BitRate::from_bits_per_second))
}

prop_compose! {
    fn any_window()(
        days in 1..=ALL_DAYS, from in 0..DAY, length in 1..=DAY, rate in any_rate(),
    ) -> Option<Window> {
        let until = match from + length {
            end if end <= DAY => end,
            end => end - DAY,
        };
        (from != until).then_some(Window { days, from, until, rate })
    }
}

prop_compose! {
    fn any_calendar()(
        windows in prop::collection::vec(any_window(), 0..6), otherwise in any_rate(),
    ) -> RateCalendar {
        RateCalendar { windows: windows.into_iter().flatten().collect(), otherwise }
    }
}

proptest! {
    #[test]
    fn printed_calendars_parse_back(calendar in any_calendar()) {
        prop_assert_eq!(calendar.to_string().parse(), Ok(calendar));
    }

    #[test]
    fn no_text_panics(text: String) {
        let _ = text.parse::<RateCalendar>();
    }

    /// Until the next change nothing changes, and there it does. Clocks change on two of these days.
    #[test]
    fn the_next_change_is_the_next(calendar in any_calendar(), hours in 0i64..24 * 365) {
        let zone = europe();
        let now = moment("2026-01-01T00:00:00Z").checked_add(hours.hours()).unwrap();
        let Held { rate, next } = calendar.at(now, &zone);
        let in_nine_days = now.checked_add((9 * 24).hours()).unwrap();
        let end = next.map_or(in_nine_days, |(at, _)| at);
        let mut at = now;
        while at < end {
            prop_assert_eq!(calendar.at(at, &zone).rate, rate, "at {}", at);
            at = at.checked_add(7.minutes()).unwrap();
        }
        if let Some((at, then)) = next {
            prop_assert_ne!(then, rate);
            prop_assert_eq!(calendar.at(at, &zone).rate, then);
            let just_before = at.checked_sub(1.nanoseconds()).unwrap();
            prop_assert_eq!(calendar.at(just_before, &zone).rate, rate);
        }
    }
}
