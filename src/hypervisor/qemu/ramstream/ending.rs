//! Recognises the proper end of a stream whose device state nobody can parse.
//!
//! Invariant: [`Ending::is_complete`] is true only if the very last bytes are the end mark and a
//! whole machine description: `00 06 <u32 len> {"..}` with `len` bytes of text up to the last one.
//!
//! Device state has no lengths, so the end mark cannot be found from the front. It can be found
//! from the back: the description is JSON and has no zero byte, its length word and the end mark
//! before it have some. So the last zero byte of the stream lies within four bytes of its start, and
//! it is enough to remember a few bytes around the last zero byte that came by. A stream that was
//! cut fails the check unless the cut is where device state happens to look exactly like this; the
//! caller asks the hypervisor as well.

use super::wire::{EOF, VMDESC};

/// Bytes before the last zero byte that matter: two marks and three bytes of length.
const BEFORE: usize = 5;
/// Bytes after it that matter: three of length and the description's first two.
const AFTER: usize = 5;

/// Watches the unparsed rest of a stream go by.
#[derive(Debug, Default)]
pub(super) struct Ending {
    total: u64,
    last: u8,
    /// The last bytes of what came before, at most [`BEFORE`].
    trail: Vec<u8>,
    /// What surrounds the last zero byte: up to [`BEFORE`] bytes, itself, up to [`AFTER`] bytes.
    around: Vec<u8>,
    /// Index of the zero byte in `around`, its position in the stream.
    zero: Option<(usize, u64)>,
}

impl Ending {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.last = *last;
        if let Some(at) = bytes.iter().rposition(|byte| *byte == 0) {
            self.around.clear();
            if at < BEFORE {
                let keep = self.trail.len().min(BEFORE - at);
                self.around.extend_from_slice(&self.trail[self.trail.len() - keep..]);
            }
            self.around.extend_from_slice(&bytes[at.saturating_sub(BEFORE)..at]);
            self.zero = Some((self.around.len(), self.total + at as u64));
            self.around.extend_from_slice(&bytes[at..bytes.len().min(at + 1 + AFTER)]);
        } else if let Some((index, _)) = self.zero {
            let missing = (index + 1 + AFTER).saturating_sub(self.around.len());
            self.around.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        }
        if bytes.len() < BEFORE {
            let keep = self.trail.len().min(BEFORE - bytes.len());
            self.trail.drain(..self.trail.len() - keep);
            self.trail.extend_from_slice(bytes);
        } else {
            self.trail.clear();
            self.trail.extend_from_slice(&bytes[bytes.len() - BEFORE..]);
        }
        self.total += bytes.len() as u64;
    }

    /// Whether the last byte that was fed was the stream's own last one.
    pub(super) fn is_complete(&self) -> bool {
        let Some((index, position)) = self.zero else { return false };
        // The last zero byte is the first, second, third or fourth of the length word.
        self.last == b'}'
            && (0..4usize).any(|nth| {
                let Some(mark) = index.checked_sub(nth + 2) else { return false };
                let Some(field) = self.around.get(mark..mark + 8) else { return false };
                let [EOF, VMDESC, a, b, c, d, b'{', b'"'] = *field else { return false };
                let len = u64::from(u32::from_be_bytes([a, b, c, d]));
                position - nth as u64 + 4 + len == self.total
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(json: usize) -> Vec<u8> {
        let mut bytes = vec![0x7E, 0, 0, 0, 9, EOF, VMDESC];
        bytes.extend_from_slice(&(json as u32).to_be_bytes());
        bytes.extend_from_slice(b"{\"");
        bytes.resize(bytes.len() + json - 3, b'x');
        bytes.push(b'}');
        bytes
    }

    fn complete(bytes: &[u8], piece: usize) -> bool {
        let mut ending = Ending::default();
        bytes.chunks(piece).for_each(|part| ending.feed(part));
        ending.is_complete()
    }

    #[test]
    fn only_the_whole_description_is_an_end() {
        // Lengths with zero bytes in every place of the length word.
        for json in [3, 0x41, 0x100, 0x1234, 0x1_0000, 0x1_0200, 0x1_0203, 0x2_0003] {
            let bytes = stream(json);
            for piece in [1, 2, 3, 5, 7, 64, bytes.len()] {
                assert!(complete(&bytes, piece), "{json:#x} by {piece}");
            }
            for cut in 0..bytes.len().min(64) {
                assert!(!complete(&bytes[..bytes.len() - 1 - cut], 7), "{json:#x} less {cut}");
            }
            let more = [&bytes[..], b"}"].concat();
            assert!(!complete(&more, 7));
        }
        assert!(!complete(b"", 1));
        assert!(!complete(b"{\"}", 1));
    }

    #[test]
    fn an_earlier_look_alike_does_not_hide_the_end() {
        let mut bytes = stream(80);
        bytes.extend_from_slice(&stream(0x1_0000));
        assert!(complete(&bytes, 11));
        assert!(!complete(&bytes[..bytes.len() - 1], 11));
    }
}
