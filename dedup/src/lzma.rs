//! Raw LZMA of one batch, for links so thin that a core has much more time for each byte than Zstandard
//! can use.
//!
//! On batches of a Debian's disk the fastest of these takes half of the time that Zstandard's level 16 takes
//! and 5 % fewer bytes; the densest takes as long as level 19 and 7 % fewer (docs/disk.md;
//! `examples/speed.rs` measures them on any file).
//!
//! Invariant: the window is never longer than the batch, nor than [`WINDOW_BYTES_MAX`]: packing takes no
//! more than 40 MiB, and unpacking the batch and its window.
//!
//! The format is an LZMA stream without a header (LZMA SDK, `lzma-specification.txt`), with 3 bits of
//! literal context, 0 of literal position and 2 of position, no end mark, the length that the batch has
//! and a window of as much, or of the most there may be.

use std::io::{Read, Write};

use lzma_rust2::{EncodeMode, LzmaOptions, LzmaReader, LzmaWriter, MfType};

const LITERAL_CONTEXT_BITS: u32 = 3;
const LITERAL_POSITION_BITS: u32 = 0;
const POSITION_BITS: u32 = 2;
/// The shortest window there is.
const WINDOW_BYTES_MIN: usize = 4096;
/// Twice as much gains 0.2 % on a Debian's disk, and takes twice the memory.
const WINDOW_BYTES_MAX: usize = 4 << 20;

/// How hard to look for matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effort {
    /// Takes the first good one.
    Quick,
    /// Weighs what follows, among a few.
    Careful,
    /// Weighs what follows, among many.
    Thorough,
}

fn options(effort: Effort, len: usize) -> LzmaOptions {
    let (mode, nice_len, finder, depth, window) = match effort {
        Effort::Quick => (EncodeMode::Fast, 128, MfType::Hc4, 8, WINDOW_BYTES_MAX),
        Effort::Careful => (EncodeMode::Normal, 16, MfType::Hc4, 4, WINDOW_BYTES_MAX),
        // A tree takes twice the memory of chains, and half of the window gives it a tenth more speed.
        Effort::Thorough => (EncodeMode::Normal, 32, MfType::Bt4, 0, WINDOW_BYTES_MAX / 2),
    };
    LzmaOptions::new(
        window_bytes(len).min(window as u32),
        LITERAL_CONTEXT_BITS,
        LITERAL_POSITION_BITS,
        POSITION_BITS,
        mode,
        nice_len,
        finder,
        depth,
    )
}

fn window_bytes(len: usize) -> u32 {
    len.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX) as u32
}

/// Packs `data`, or gives nothing: an encoder that fails counts as one that gains nothing.
pub(crate) fn pack(effort: Effort, data: &[u8]) -> Option<Vec<u8>> {
    let options = options(effort, data.len());
    let mut writer = LzmaWriter::new_no_header(Vec::new(), &options, false).ok()?;
    writer.write_all(data).ok()?;
    writer.finish().ok()
}

/// Unpacks what [`pack`] made of `len` bytes; nothing if it is anything else.
pub(crate) fn unpack(body: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut reader = LzmaReader::new(
        body,
        len as u64,
        LITERAL_CONTEXT_BITS,
        LITERAL_POSITION_BITS,
        POSITION_BITS,
        window_bytes(len),
        None,
    )
    .ok()?;
    let mut data = vec![0; len];
    reader.read_exact(&mut data).ok()?;
    // Only this makes the reader look whether the stream is over.
    let is_over = reader.read(&mut [0]).ok()? == 0;
    let (behind, read_ahead) = reader.into_parts();
    (is_over && behind.is_empty() && read_ahead.is_empty()).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0_u32..).flat_map(|n| format!("line {n} of a log\n").into_bytes()).take(len).collect()
    }

    #[test]
    fn what_is_packed_comes_back_and_nothing_else_does() {
        for len in [1, 100, 5000, 300_000, 5 << 20] {
            for effort in [Effort::Quick, Effort::Careful, Effort::Thorough] {
                let data = text(len);
                let body = pack(effort, &data).unwrap();
                assert_eq!(unpack(&body, len).as_ref(), Some(&data), "{effort:?} {len}");
                assert_eq!(unpack(&body, len + 1), None, "longer");
                assert_eq!(unpack(&[&body[..], &[0]].concat(), len), None, "more behind it");
                for cut in (0..body.len()).step_by(1 + body.len() / 50) {
                    assert_eq!(unpack(&body[..cut], len), None, "{effort:?} cut at {cut}");
                }
            }
        }
    }

    #[test]
    fn damage_gives_something_of_the_stated_length_or_nothing() {
        let body = pack(Effort::Quick, &text(5000)).unwrap();
        for at in 0..body.len() {
            let mut damaged = body.clone();
            damaged[at] ^= 0x40;
            assert!(unpack(&damaged, 5000).is_none_or(|data| data.len() == 5000));
        }
    }
}
