//! The name of an agent: the BLAKE3 hash of its public key, in a form that people can read aloud.
//!
//! Invariant: two fingerprints are equal exactly when the 32 bytes are, and every printed form
//! parses back to the same bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// What every printed fingerprint begins with, so that one is recognised in a log or a chat.
const PREFIX: &str = "LH";
/// Crockford's base 32: no I, L, O or U, so that nothing is misread
/// (<https://www.crockford.com/base32.html>).
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Symbols of 5 bits that hold 256 bits; the last four bits of the last symbol are zero.
const SYMBOLS: usize = 52;
/// Symbols between two dashes.
const GROUP: usize = 4;
/// Longest text that is looked at; leaves room for a separator after every symbol.
const MAX_TEXT: usize = 160;

/// BLAKE3-256 of the SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7) of an agent's certificate.
///
/// It names the key, not the certificate: a certificate made anew from the same key keeps it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of the public key in `spki`, a DER-encoded SubjectPublicKeyInfo.
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self(*blake3::hash(spki).as_bytes())
    }

    /// A fingerprint from its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first two groups, for tables where the whole does not fit. Never compare by it.
    pub fn short(&self) -> String {
        self.to_string().chars().take(PREFIX.len() + 2 * (GROUP + 1)).collect()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(PREFIX.len() + SYMBOLS + SYMBOLS / GROUP);
        text.push_str(PREFIX);
        for symbol in 0..SYMBOLS {
            if symbol % GROUP == 0 {
                text.push('-');
            }
            let value = (0..5).fold(0, |value, bit| value << 1 | self.bit(symbol * 5 + bit));
            text.push(char::from(ALPHABET[usize::from(value)]));
        }
        f.pad(&text)
    }
}

impl Fingerprint {
    /// Bit `index` counted from the highest bit of the first byte; zero past the end.
    fn bit(&self, index: usize) -> u8 {
        self.0.get(index / 8).map_or(0, |byte| byte >> (7 - index % 8) & 1)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseFingerprintError {
    /// Not as many symbols as 256 bits need.
    #[error(
        "a fingerprint has {SYMBOLS} letters and digits after `LH-`, this one has {found}: copy it whole"
    )]
    Length {
        /// Symbols that were found, `LH` and separators not counted.
        found: usize,
    },
    /// A character that no fingerprint contains.
    #[error("{0:?} occurs in no fingerprint")]
    Symbol(char),
    /// The last symbol carries more bits than the key has.
    #[error("the last letter of the fingerprint is mistyped")]
    Tail,
}

impl FromStr for Fingerprint {
    type Err = ParseFingerprintError;

    /// Reads a fingerprint with any case, with spaces, dashes, colons, dots or nothing between the
    /// groups, with or without `LH`, and takes O for 0 and I or L for 1.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_TEXT {
            return Err(ParseFingerprintError::Length { found: text.len() });
        }
        let mut symbols: Vec<char> = text
            .chars()
            .filter(|c| !c.is_whitespace() && !matches!(c, '-' | ':' | '.' | '_'))
            .map(|c| c.to_ascii_uppercase())
            .collect();
        // No printed fingerprint begins with L otherwise, so one that was cut short is not read as
        // another.
        if symbols.iter().take(PREFIX.len()).copied().eq(PREFIX.chars()) {
            symbols.drain(..PREFIX.len());
        }
        if symbols.len() != SYMBOLS {
            return Err(ParseFingerprintError::Length { found: symbols.len() });
        }
        let mut bytes = [0u8; 32];
        for (place, &symbol) in symbols.iter().enumerate() {
            let value = symbol_value(symbol).ok_or(ParseFingerprintError::Symbol(symbol))?;
            for bit in 0..5 {
                let set = value >> (4 - bit) & 1;
                let index = place * 5 + bit;
                match bytes.get_mut(index / 8) {
                    Some(byte) => *byte |= set << (7 - index % 8),
                    None if set == 1 => return Err(ParseFingerprintError::Tail),
                    None => {}
                }
            }
        }
        Ok(Self(bytes))
    }
}

fn symbol_value(symbol: char) -> Option<u8> {
    let symbol = match symbol {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let place = ALPHABET.iter().position(|&c| char::from(c) == symbol)?;
    u8::try_from(place).ok()
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn printed_form_is_fixed() {
        let zero = Fingerprint::from_bytes([0; 32]);
        assert_eq!(zero.to_string(), format!("LH{}", "-0000".repeat(13)));
        let ones = Fingerprint::from_bytes([0xff; 32]);
        assert_eq!(ones.to_string(), format!("LH{}-ZZZG", "-ZZZZ".repeat(12)));
        assert_eq!(ones.short(), "LH-ZZZZ-ZZZZ");
    }

    #[test]
    fn mistakes_are_named() {
        let cut = format!("LH{}", "0".repeat(50));
        assert_eq!(cut.parse::<Fingerprint>(), Err(ParseFingerprintError::Length { found: 50 }));
        let good = Fingerprint::from_bytes([7; 32]).to_string();
        let short = &good[..good.len() - 1];
        assert_eq!(short.parse::<Fingerprint>(), Err(ParseFingerprintError::Length { found: 51 }));
        assert_eq!(
            format!("{short}U").parse::<Fingerprint>(),
            Err(ParseFingerprintError::Symbol('U'))
        );
        assert_eq!(format!("{short}Z").parse::<Fingerprint>(), Err(ParseFingerprintError::Tail));
        assert!("0".repeat(10_000).parse::<Fingerprint>().is_err());
    }

    proptest! {
        #[test]
        fn every_form_parses_back(bytes: [u8; 32], separator in "[-: ._]?", lower: bool) {
            let fingerprint = Fingerprint::from_bytes(bytes);
            let mut text = fingerprint.to_string().replace('-', &separator);
            if lower {
                text = text.to_lowercase();
            }
            prop_assert_eq!(text.parse::<Fingerprint>(), Ok(fingerprint));
            let bare = text.replacen(if lower { "lh" } else { "LH" }, "", 1);
            prop_assert_eq!(bare.parse::<Fingerprint>(), Ok(fingerprint));
            let json = serde_json::to_string(&fingerprint).unwrap();
            prop_assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Fingerprint>();
        }
    }
}
