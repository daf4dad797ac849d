//! A rate in bits per second, as operators write it: `20M`, `1.5G`.
//!
//! Invariant: a rate is never zero (no cap is `None`, not 0), and its printed form parses back to
//! exactly the same number.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Decimal units: networks count in powers of ten.
const UNITS: [(char, u64); 4] =
    [('T', 1_000_000_000_000), ('G', 1_000_000_000), ('M', 1_000_000), ('k', 1_000)];
/// Longest text that is looked at.
const MAX_TEXT: usize = 40;

/// Bits per second, at least one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitRate(u64);

impl BitRate {
    /// `bits` per second; a zero is raised to one.
    pub const fn from_bits_per_second(bits: u64) -> Self {
        Self(if bits == 0 { 1 } else { bits })
    }

    /// Bits per second.
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// Whole bytes that pass in `span`, rounded down; `u64::MAX` if there are more than that.
    pub fn bytes_in(self, span: Duration) -> u64 {
        let bytes = u128::from(self.0) * span.as_nanos() / 8_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// How long `bytes` take, rounded up to a nanosecond.
    pub fn time_for(self, bytes: u64) -> Duration {
        let nanos = (u128::from(bytes) * 8_000_000_000).div_ceil(u128::from(self.0));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for BitRate {
    /// The shortest exact form: `200M`, `1.5G`, `1234567`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in UNITS {
            // Three decimals are read at a glance; what needs more is clearer as a smaller unit.
            if self.0 >= factor && self.0.is_multiple_of(factor / 1_000) {
                let (whole, thousandths) = (self.0 / factor, self.0 % factor / (factor / 1_000));
                let fraction = format!("{thousandths:03}");
                let fraction = fraction.trim_end_matches('0');
                let point = if fraction.is_empty() { "" } else { "." };
                return f.pad(&format!("{whole}{point}{fraction}{unit}"));
            }
        }
        f.pad(&self.0.to_string())
    }
}

impl fmt::Debug for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}bit/s")
    }
}

/// Why a text is no rate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseBitRateError {
    /// Not a number with an optional unit.
    #[error("{0:?} is no rate: write bits per second as in 800k, 20M or 1.5G")]
    Malformed(String),
    /// Nothing would ever pass.
    #[error("a rate of zero would stop the transfer for good: leave the cap out, or pause the job")]
    Zero,
    /// More than 64 bits hold.
    #[error("{0:?} is more than any link carries")]
    TooLarge(String),
}

impl FromStr for BitRate {
    type Err = ParseBitRateError;

    /// Reads digits, at most one point, one of `k`, `M`, `G`, `T` in any case, and optionally
    /// `bit/s`, `bit` or `bps` behind it. A fraction of a bit is cut off.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shown = || text.chars().take(MAX_TEXT).collect::<String>();
        let malformed = || ParseBitRateError::Malformed(shown());
        if text.len() > MAX_TEXT {
            return Err(malformed());
        }
        let lower = text.trim().to_ascii_lowercase();
        let body = ["bit/s", "bps", "bit"]
            .iter()
            .find_map(|suffix| lower.strip_suffix(suffix))
            .unwrap_or(&lower)
            .trim_end();
        let (number, factor) = UNITS
            .iter()
            .find_map(|(unit, factor)| {
                Some((body.strip_suffix(unit.to_ascii_lowercase())?.trim_end(), *factor))
            })
            .unwrap_or((body, 1));
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || whole.len() + fraction.len() == 0 {
            return Err(malformed());
        }
        let too_large = || ParseBitRateError::TooLarge(shown());
        let whole: u64 =
            if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
        // Digit by digit: binary floating point would turn 0.3G into 299999999.
        let mut bits = whole.checked_mul(factor).ok_or_else(too_large)?;
        let mut place = factor;
        for digit in fraction.bytes().map(|byte| u64::from(byte - b'0')) {
            place /= 10;
            bits = bits.checked_add(digit * place).ok_or_else(too_large)?;
        }
        if bits == 0 { Err(ParseBitRateError::Zero) } else { Ok(Self(bits)) }
    }
}

impl Serialize for BitRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BitRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_operators_write_is_read() {
        for (text, bits) in [
            ("200M", 200_000_000),
            ("1.5G", 1_500_000_000),
            ("20m", 20_000_000),
            ("0.3g", 300_000_000),
            ("800 kbit/s", 800_000),
            ("64000", 64_000),
            (" 10Gbps ", 10_000_000_000),
            (".5M", 500_000),
        ] {
            assert_eq!(text.parse(), Ok(BitRate(bits)), "{text}");
        }
        for text in ["", "M", "fast", "-1M", "1.2.3G", "1e9", "20MB", "."] {
            assert!(
                matches!(text.parse::<BitRate>(), Err(ParseBitRateError::Malformed(_))),
                "{text}"
            );
        }
        assert_eq!("0M".parse::<BitRate>(), Err(ParseBitRateError::Zero));
        assert!(matches!("99999999999T".parse::<BitRate>(), Err(ParseBitRateError::TooLarge(_))));
    }

    #[test]
    fn the_shortest_exact_form_is_printed() {
        let shown = [
            (200_000_000, "200M"),
            (1_500_000_000, "1.5G"),
            (1_234, "1.234k"),
            (1_234_567, "1234.567k"),
            (999, "999"),
        ];
        for (bits, text) in shown {
            assert_eq!(BitRate(bits).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn printed_rates_parse_back(bits in 1u64..) {
            prop_assert_eq!(BitRate(bits).to_string().parse(), Ok(BitRate(bits)));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<BitRate>();
        }

        #[test]
        fn time_and_bytes_agree(bits in 1u64..1 << 40, bytes in 0u64..1 << 40) {
            let rate = BitRate(bits);
            prop_assert!(rate.bytes_in(rate.time_for(bytes)) >= bytes);
        }
    }
}
