//! What compression makes of the missing bytes, and what processor time anything takes.

use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::image::Image;

/// Matches are looked for this far back: 128 MiB, what `zstd --long=27` means.
const WINDOW_LOG: u32 = 27;

/// Bytes of a frame by itself, as the engine made them before it had windows.
const FRAME_BYTES: usize = 1 << 20;

/// Compressed bytes and what they cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Coded {
    /// Bytes.
    pub bytes: u64,
    /// Seconds of processor time.
    pub cpu_s: f64,
}

/// Processor time that this thread has had.
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// Calls `work`; gives its result and the seconds of processor time that it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let before = thread_cpu();
    let result = work();
    (result, (thread_cpu() - before).as_secs_f64())
}

/// A writer that only counts.
#[derive(Debug, Default)]
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compresses ranges of an image's data as one stream, across whatever lies between them.
///
/// # Errors
///
/// When the encoder has no memory.
pub fn compress(image: &Image, ranges: &[Range<usize>], level: i32) -> Result<Coded> {
    let (bytes, cpu_s) = timed(|| -> io::Result<u64> {
        let mut encoder = zstd::Encoder::new(Count::default(), level)?;
        encoder.window_log(WINDOW_LOG)?;
        encoder.long_distance_matching(true)?;
        for range in ranges {
            encoder.write_all(&image.data()[range.clone()])?;
        }
        Ok(encoder.finish()?.0)
    });
    Ok(Coded { bytes: bytes.context("while compressing")?, cpu_s })
}

/// Compresses ranges of an image's data in frames of 1 MiB that know nothing of each other.
///
/// # Errors
///
/// When the encoder has no memory.
pub fn compress_in_frames(image: &Image, ranges: &[Range<usize>], level: i32) -> Result<Coded> {
    let (bytes, cpu_s) = timed(|| -> io::Result<u64> {
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        let mut frame = Vec::with_capacity(FRAME_BYTES);
        let mut bytes = 0;
        for range in ranges {
            let mut rest = &image.data()[range.clone()];
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(rest.len().min(FRAME_BYTES - frame.len()));
                frame.extend_from_slice(head);
                rest = tail;
                if frame.len() == FRAME_BYTES {
                    bytes += compressor.compress(&frame)?.len() as u64;
                    frame.clear();
                }
            }
        }
        Ok(bytes + compressor.compress(&frame)?.len() as u64)
    });
    Ok(Coded { bytes: bytes.context("while compressing")?, cpu_s })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_sees_what_a_frame_does_not() {
        let mut bytes = vec![0; 4 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes[..2 << 20]);
        bytes.copy_within(..2 << 20, 2 << 20);
        let image = Image::of(&bytes);
        let parts = [0..1 << 20, 1 << 20..4 << 20];
        let long = compress(&image, &parts, 3).unwrap();
        let frames = compress_in_frames(&image, &parts, 3).unwrap();
        assert!(long.bytes < (2 << 20) + 100_000, "{long:?}");
        assert!(frames.bytes >= 4 << 20, "{frames:?}");
    }
}
