//! Reading and writing the small integers of our formats.
//!
//! Invariant: nothing here reads past its input, allocates, or accepts two spellings of one value.
//! Fixed-width integers are little-endian. A varint is LEB128 of at most 10 bytes in its shortest
//! form; a longer spelling of the same number is refused, so that equal values have equal bytes.

/// Why bytes from a peer or a disk are not what they claim to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The input ends inside a field.
    #[error("{what}: the input ends inside it")]
    Truncated {
        /// The field.
        what: &'static str,
    },
    /// A length, count or position is beyond its limit.
    #[error("{what} is {found}, the limit is {limit}")]
    TooLarge {
        /// The field.
        what: &'static str,
        /// What the input says.
        found: u64,
        /// The largest value that is accepted.
        limit: u64,
    },
    /// A value has no meaning in this place.
    #[error("{what} has no meaning here")]
    Invalid {
        /// The field.
        what: &'static str,
    },
    /// Bytes follow where the input should have ended.
    #[error("{bytes} bytes follow the end")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// The unread rest of an input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { rest: input }
    }

    /// Behind the version byte with which an input begins, if it is this one.
    pub(crate) fn of_version(input: &'a [u8], version: u8) -> Result<Self, DecodeError> {
        let mut cursor = Self::new(input);
        if cursor.u8("version")? != version {
            return Err(DecodeError::Invalid { what: "version" });
        }
        Ok(cursor)
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let (head, rest) =
            self.rest.split_at_checked(len).ok_or(DecodeError::Truncated { what })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(DecodeError::Truncated { what })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit only.
            if shift == 63 && bits > 1 {
                return Err(DecodeError::Invalid { what });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                let padded = byte == 0 && shift > 0;
                return if padded { Err(DecodeError::Invalid { what }) } else { Ok(value) };
            }
        }
        Err(DecodeError::Invalid { what })
    }

    /// A varint that counts or measures something and may not exceed `limit`.
    pub(crate) fn bounded(&mut self, limit: u64, what: &'static str) -> Result<u64, DecodeError> {
        let found = self.varint(what)?;
        if found > limit {
            return Err(DecodeError::TooLarge { what, found, limit });
        }
        Ok(found)
    }

    /// [`bounded`](Self::bounded) for what is then used as a length in memory.
    pub(crate) fn count(&mut self, limit: usize, what: &'static str) -> Result<usize, DecodeError> {
        let found = self.bounded(limit as u64, what)?;
        Ok(usize::try_from(found).expect("it is at most a usize"))
    }

    /// The difference of a value to the one that was expected, as [`put_difference`] wrote it.
    pub(crate) fn difference(
        &mut self,
        expected: u64,
        what: &'static str,
    ) -> Result<u64, DecodeError> {
        let coded = self.varint(what)?;
        let difference = (coded >> 1) ^ (coded & 1).wrapping_neg();
        Ok(expected.wrapping_add(difference))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Trailing { bytes: self.rest.len() })
        }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes `value` as its zigzag difference (modulo 2^64) to `expected`: small either way is short.
pub(crate) fn put_difference(out: &mut Vec<u8>, value: u64, expected: u64) {
    let difference = value.wrapping_sub(expected).cast_signed();
    put_varint(out, ((difference << 1) ^ (difference >> 63)).cast_unsigned());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_longer_spelling_of_a_varint_is_refused() {
        assert_eq!(Cursor::new(&[0x80, 0x00]).varint("n"), Err(DecodeError::Invalid { what: "n" }));
        let eleven = [0xff; 11];
        assert_eq!(Cursor::new(&eleven).varint("n"), Err(DecodeError::Invalid { what: "n" }));
        let beyond_64_bits = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        assert_eq!(
            Cursor::new(&beyond_64_bits).varint("n"),
            Err(DecodeError::Invalid { what: "n" })
        );
    }

    proptest! {
        #[test]
        fn varints_and_differences_come_back(value: u64, expected: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            put_difference(&mut bytes, value, expected);
            let mut cursor = Cursor::new(&bytes);
            prop_assert_eq!(cursor.varint("v"), Ok(value));
            prop_assert_eq!(cursor.difference(expected, "d"), Ok(value));
            prop_assert_eq!(cursor.finish(), Ok(()));
        }

        #[test]
        fn what_a_varint_accepts_is_what_it_writes(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut cursor = Cursor::new(&bytes);
            if let Ok(value) = cursor.varint("v") {
                let mut again = Vec::new();
                put_varint(&mut again, value);
                prop_assert_eq!(&bytes[..bytes.len() - cursor.rest().len()], &again[..]);
            }
        }
    }
}
