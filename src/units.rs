//! Amounts as people write and read them: `512M`, `300ms`, `1.2 GiB`.
//!
//! Invariant: what is parsed here is exact; what is formatted here is for eyes only and is never
//! parsed again. Byte counts are binary (`1K` is 1024 bytes), as QEMU's and every disk tool's are;
//! bit rates are decimal, as links are sold, and live in `longhaul_transport::BitRate`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes of a MiB, for rates and sizes that are estimates.
pub(crate) const MIB: f64 = 1_048_576.0;

/// An amount that could not be read; the text shows one that can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Not a number with a known unit.
    #[error("`{0}` is not a size; write e.g. 512M or 4G (powers of 1024 bytes)")]
    Size(String),
    /// Not a number with a known unit.
    #[error("`{0}` is not a duration; write e.g. 300ms, 90s, 30m, 2h or 1d")]
    Duration(String),
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

impl FromStr for ByteCount {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let wrong = || AmountError::Size(text.to_owned());
        let (number, unit) = split(text).ok_or_else(wrong)?;
        let shift = match unit {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        // 1023.95 would round to "1024.0": move on to the next unit before that.
        while value >= 1023.95 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        match unit {
            0 => write!(f, "{} B", self.0),
            _ => write!(f, "{value:.1} {}", units[unit]),
        }
    }
}

/// Reads `300ms`, `90s`, `30m`, `2h`, `1d`.
pub fn parse_duration(text: &str) -> Result<Duration, AmountError> {
    let wrong = || AmountError::Duration(text.to_owned());
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
}

/// A duration in at most two units: `87 ms`, `4.2 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`.
pub fn duration_text(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        _ if ms < 1000 => format!("{ms} ms"),
        0..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A bit rate with three digits or so: `940 bit/s`, `18.3 Mbit/s`.
pub fn rate_text(bits_per_s: u64) -> String {
    let units = ["kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"];
    if bits_per_s < 1000 {
        return format!("{bits_per_s} bit/s");
    }
    let mut value = bits_per_s as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

/// Splits `12ms` into 12 and `ms`; `None` if it does not start with digits.
fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, text[end..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!("512M".parse(), Ok(ByteCount(512 << 20)));
        assert_eq!("4 GiB".parse(), Ok(ByteCount(4 << 30)));
        assert_eq!("17".parse(), Ok(ByteCount(17)));
        for wrong in ["", "M", "-1", "1.5G", "1X", "99999999999T"] {
            assert!(wrong.parse::<ByteCount>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(ByteCount(0).to_string(), "0 B");
        assert_eq!(ByteCount(1023).to_string(), "1023 B");
        assert_eq!(ByteCount(1 << 20).to_string(), "1.0 MiB");
        assert_eq!(ByteCount((1 << 30) - 1).to_string(), "1.0 GiB");
        assert_eq!(ByteCount(u64::MAX).to_string(), "16384.0 PiB");
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert!(parse_duration("300").is_err());
        assert!(parse_duration("1e9s").is_err());
        assert_eq!(duration_text(87), "87 ms");
        assert_eq!(duration_text(4_260), "4.2 s");
        assert_eq!(duration_text(200_000), "3 min 20 s");
        assert_eq!(duration_text(90_000_000), "1 d 1 h");
    }

    #[test]
    fn rates_read_well() {
        assert_eq!(rate_text(940), "940 bit/s");
        assert_eq!(rate_text(18_300_000), "18.3 Mbit/s");
        assert_eq!(rate_text(999_999), "1.0 Mbit/s");
    }
}
