//! Grains: small pieces of data, some hundred bytes each, cut by content wherever that lies.
//!
//! Blocks find what is equal. What is only similar (a library's next version, a table's page with one
//! row changed) is found by the grains that two stretches share: who has the one names its grains,
//! two bytes each, and who has the other says which of them it is made of, and sends the rest
//! ([`patch`](crate::patch)). Which stretches are worth that is found by samples, one grain of many.
//!
//! Invariant: where a grain ends depends on the bytes before that alone, at most [`MAX_GRAIN_BYTES`]
//! of them, so two stretches that share bytes soon cut them alike. Whatever is found by grains is a
//! guess: a piece is verified as a whole.
//!
//! The rolling hash is gear (Xia et al., "Ddelta", Performance Evaluation 79, 2014), its table drawn
//! from BLAKE3.

use std::ops::Range;
use std::sync::LazyLock;

use xxhash_rust::xxh3::xxh3_64;

/// The shortest grain, in bytes, but for the end of a stretch.
pub const MIN_GRAIN_BYTES: usize = 64;
/// The longest grain, in bytes.
pub const MAX_GRAIN_BYTES: usize = 1024;

/// One of so many positions ends a grain: smaller grains share more and need more names. On a Debian
/// before and after updates 128 left 4 % less to send than 256, for twice the names; 512 8 % more.
const CUT_OF: u64 = 256;
/// One of so many grains is a sample.
const SAMPLE_OF: u64 = 32;

static GEAR: LazyLock<[u64; 256]> = LazyLock::new(|| {
    let mut bytes = [0; 256 * 8];
    blake3::Hasher::new().update(b"longhaul gear").finalize_xof().fill(&mut bytes);
    let mut table = [0; 256];
    for (value, bytes) in table.iter_mut().zip(bytes.as_chunks().0) {
        *value = u64::from_le_bytes(*bytes);
    }
    table
});

/// A grain of a stretch of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grain {
    /// Its bytes within the stretch.
    pub range: Range<usize>,
    /// Whether it is a sample: whether it is depends on where it ends, not on where it begins.
    pub is_sample: bool,
}

/// Cuts a stretch into grains, in order.
pub fn cut(data: &[u8]) -> impl Iterator<Item = Grain> + '_ {
    let gear = &*GEAR;
    let mut begin = 0;
    std::iter::from_fn(move || {
        let longest = begin..data.len().min(begin + MAX_GRAIN_BYTES);
        if longest.is_empty() {
            return None;
        }
        let mut hash = 0_u64;
        let end = data[longest.clone()].iter().enumerate().position(|(at, byte)| {
            hash = (hash << 1).wrapping_add(gear[usize::from(*byte)]);
            hash < u64::MAX / CUT_OF && at + 1 >= MIN_GRAIN_BYTES
        });
        let range = begin..end.map_or(longest.end, |at| begin + at + 1);
        begin = range.end;
        Some(Grain { range, is_sample: end.is_some() && hash < u64::MAX / CUT_OF / SAMPLE_OF })
    })
}

/// By what a sample is looked for among all that lies at a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrainId([u8; Self::BYTES]);

impl GrainId {
    /// Bytes in an id.
    pub const BYTES: usize = 5;

    /// Of a grain with these bytes.
    pub fn of(grain: &[u8]) -> Self {
        Self(*xxh3_64(grain).to_be_bytes().first_chunk().expect("a hash is longer"))
    }

    /// An id that somebody else computed.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

/// By what a grain is told from the others of a stretch: two bytes, which two grains in a row make
/// enough.
pub type GrainName = u16;

/// The name of a grain with these bytes.
pub fn name(grain: &[u8]) -> GrainName {
    // Not what its id is made of: samples must not have names of their own.
    xxh3_64(grain) as GrainName
}

/// Where each sample of a stretch begins, and its id.
pub fn samples(data: &[u8]) -> impl Iterator<Item = (usize, GrainId)> + '_ {
    cut(data)
        .filter(|grain| grain.is_sample)
        .map(|grain| (grain.range.start, GrainId::of(&data[grain.range])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn ends(data: &[u8]) -> Vec<usize> {
        cut(data).map(|grain| grain.range.end).collect()
    }

    #[test]
    fn grains_cover_a_stretch_in_order() {
        for len in [0, 1, 63, 64, 65, 1024, 100_000] {
            let data = noise(1, len);
            let mut end = 0;
            for grain in cut(&data) {
                assert_eq!(grain.range.start, end);
                end = grain.range.end;
                assert!(grain.range.len() <= MAX_GRAIN_BYTES);
                assert!(grain.range.len() >= MIN_GRAIN_BYTES || end == len);
            }
            assert_eq!(end, len);
        }
        let grains = ends(&noise(1, 1 << 20)).len();
        assert!((2_800..4_000).contains(&grains), "{grains}");
        let samples = samples(&noise(1, 4 << 20)).count();
        assert!((300..600).contains(&samples), "{samples}");
        // Without a cut by content.
        assert_eq!(cut(&[7; 5000]).filter(|grain| grain.is_sample).count(), 0);
    }

    #[test]
    fn what_is_shared_is_cut_alike_wherever_it_lies() {
        let shared = noise(2, 50_000);
        let one = [noise(3, 777), shared.clone()].concat();
        let other = [noise(4, 12_345), shared].concat();
        let one: Vec<usize> = ends(&one).iter().map(|end| end.wrapping_sub(777)).collect();
        let other: Vec<usize> = ends(&other).iter().map(|end| end.wrapping_sub(12_345)).collect();
        let alike = one.iter().filter(|end| other.contains(end)).count();
        assert!(alike + 8 > one.len(), "{alike} of {}", one.len());
    }

    /// Ends and ids are in records and on the wire.
    #[test]
    fn cuts_and_ids_are_fixed() {
        let data = noise(5, 2000);
        assert_eq!(ends(&data), [301, 665, 856, 1250, 1337, 1409, 1560, 1876, 2000]);
        assert_eq!(GrainId::of(b"abc").as_bytes(), b"\x78\xaf\x5f\x94\x89");
        assert_eq!(name(b"abc"), 0x3950);
    }
}
