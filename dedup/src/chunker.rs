//! Where one chunk ends and the next begins.
//!
//! Chunks are cut by content (FastCDC, the 2020 variant, normalisation level 1), so that bytes that
//! moved inside a disk or between disks are still found. Zeros never get here: [`split_zero_runs`]
//! takes them out first.
//!
//! Invariant: cuts depend on the parameters and the bytes of one contiguous extent, never on how
//! these bytes were read. [`StreamChunker`] therefore cuts exactly where [`chunks`] does.

use std::ops::Range;

use fastcdc::v2020::{AVERAGE_MIN, FastCDC, MAXIMUM_MIN, MINIMUM_MIN};

/// The largest chunk that any parameters may make, and that any decoder accepts, in bytes.
///
/// It bounds what one chunk costs in memory and what one stale guess costs in disk reads.
pub const MAX_CHUNK_BYTES: u32 = 1 << 20;

/// The granularity at which zeros are looked for: a page, and the smallest block of a disk that
/// file systems leave untouched.
pub const ZERO_GRANULARITY: usize = 4096;

/// How long chunks may be, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkerParams {
    min: u32,
    avg: u32,
    max: u32,
}

/// Chunk sizes that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "chunk sizes {min}/{avg}/{max}: need even numbers with \
     64 <= min < avg < max, avg >= 256 and 1024 <= max <= 1048576"
)]
pub struct ParamsError {
    min: u32,
    avg: u32,
    max: u32,
}

impl ChunkerParams {
    /// Sizes that FastCDC accepts. `avg` is nominal: real averages come out 1.2 to 1.3 times as
    /// long.
    pub fn new(min: u32, avg: u32, max: u32) -> Result<Self, ParamsError> {
        // The scan goes two bytes at a time: odd sizes would shift its limits.
        let even = [min, avg, max].iter().all(|size| size.is_multiple_of(2));
        let usable = even
            && min as usize >= MINIMUM_MIN
            && avg as usize >= AVERAGE_MIN
            && max as usize >= MAXIMUM_MIN
            && min < avg
            && avg < max
            && max <= MAX_CHUNK_BYTES;
        if usable { Ok(Self { min, avg, max }) } else { Err(ParamsError { min, avg, max }) }
    }

    /// The shortest chunk but for the last of an extent.
    pub fn min(&self) -> u32 {
        self.min
    }

    /// The nominal average.
    pub fn avg(&self) -> u32 {
        self.avg
    }

    /// The longest chunk.
    pub fn max(&self) -> u32 {
        self.max
    }

    fn first_cut(&self, data: &[u8]) -> usize {
        let mut cutter = self.cutter(data);
        cutter.next().map_or(0, |chunk| chunk.length)
    }

    fn cutter<'a>(&self, data: &'a [u8]) -> FastCDC<'a> {
        FastCDC::new(data, self.min as usize, self.avg as usize, self.max as usize)
    }
}

impl Default for ChunkerParams {
    /// 16, 64 and 256 KiB: small enough to find a changed file's neighbours, large enough that 32
    /// bytes of id for a chunk do not matter.
    fn default() -> Self {
        Self { min: 16 << 10, avg: 64 << 10, max: 256 << 10 }
    }
}

/// One chunk's place, relative to the beginning of its extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u32,
}

/// The chunks of one contiguous extent, in order and without gaps.
pub fn chunks(params: ChunkerParams, data: &[u8]) -> impl Iterator<Item = Cut> + '_ {
    params.cutter(data).map(|chunk| Cut { offset: chunk.offset as u64, len: chunk.length as u32 })
}

/// Cuts an extent that arrives in blocks, as [`chunks`] would cut it in one.
///
/// It keeps the bytes behind the last cut, less than twice [`ChunkerParams::max`]; the caller keeps
/// whatever it needs of the data itself.
#[derive(Debug)]
pub struct StreamChunker {
    params: ChunkerParams,
    /// Bytes that were pushed and not cut: less than `max`, between calls.
    carry: Vec<u8>,
    /// Where `carry` begins in the extent.
    offset: u64,
}

impl StreamChunker {
    /// A chunker at the beginning of an extent.
    pub fn new(params: ChunkerParams) -> Self {
        Self { params, carry: Vec::new(), offset: 0 }
    }

    /// The next block of the extent; gives the cuts that no later block can change.
    pub fn push(&mut self, data: &[u8]) -> Vec<Cut> {
        let max = self.params.max as usize;
        let mut cuts = Vec::new();
        let mut rest = data;
        let carried = self.carry.len();
        if carried > 0 {
            // A cut looks at most `max` bytes ahead: so much of the block settles every chunk that
            // begins in what was carried, without a copy of the whole block.
            self.carry.extend_from_slice(&data[..data.len().min(max)]);
            let mut begin = 0;
            while begin < carried && self.carry.len() - begin >= max {
                begin += self.cut(self.params.first_cut(&self.carry[begin..]), &mut cuts);
            }
            if begin < carried {
                self.carry.drain(..begin);
                return cuts;
            }
            self.carry.clear();
            rest = &data[begin - carried..];
        }
        while rest.len() >= max {
            let len = self.cut(self.params.first_cut(rest), &mut cuts);
            rest = &rest[len..];
        }
        self.carry.extend_from_slice(rest);
        cuts
    }

    /// The extent ends here; gives the remaining cuts.
    pub fn finish(mut self) -> Vec<Cut> {
        let mut cuts = Vec::new();
        let carry = std::mem::take(&mut self.carry);
        for chunk in self.params.cutter(&carry) {
            self.cut(chunk.length, &mut cuts);
        }
        cuts
    }

    fn cut(&mut self, len: usize, cuts: &mut Vec<Cut>) -> usize {
        cuts.push(Cut { offset: self.offset, len: len as u32 });
        self.offset += len as u64;
        len
    }
}

/// Whether every byte is 0. Runs at memory speed where it is, and ends early where it is not.
pub fn is_zero(data: &[u8]) -> bool {
    // Or-ing a fixed-size block has no branches inside, which lets the compiler use wide registers.
    let mut blocks = data.chunks_exact(128);
    blocks.all(|block| block.iter().fold(0, |bits, byte| bits | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// Splits `data` into runs that are zero and runs that are not, seen in blocks of `granularity`
/// bytes (the last block may be shorter), in order and without gaps. Neighbours differ.
///
/// # Panics
/// If `granularity` is 0.
pub fn split_zero_runs(data: &[u8], granularity: usize) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut begin = 0;
    for block in data.chunks(granularity) {
        let end = begin + block.len();
        let zero = is_zero(block);
        match runs.last_mut() {
            Some((run, run_is_zero)) if *run_is_zero == zero => run.end = end,
            _ => runs.push((begin..end, zero)),
        }
        begin = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn small() -> ChunkerParams {
        ChunkerParams::new(256, 1024, 4096).unwrap()
    }

    #[test]
    fn unusable_sizes_are_refused() {
        for (min, avg, max) in [
            (0, 1024, 4096),
            (255, 1024, 4096),
            (256, 1024, 4095),
            (1024, 1024, 4096),
            (256, 4096, 4096),
            (256, 1024, MAX_CHUNK_BYTES + 2),
        ] {
            assert!(ChunkerParams::new(min, avg, max).is_err(), "{min}/{avg}/{max}");
        }
        assert_eq!(
            ChunkerParams::new(16 << 10, 64 << 10, 256 << 10).unwrap(),
            ChunkerParams::default()
        );
    }

    /// A recipe made by one release finds its chunks again by the next: cuts are part of the
    /// promise, and a new version of the chunking crate must not move them.
    #[test]
    fn cuts_of_the_default_parameters_never_move() {
        let data = noise(1, 1 << 20);
        let lens: Vec<u32> = chunks(ChunkerParams::default(), &data).map(|cut| cut.len).collect();
        assert_eq!(lens, GOLDEN_LENS);
    }

    const GOLDEN_LENS: &[u32] =
        &[76660, 159933, 188476, 66903, 40565, 71991, 79179, 82490, 17420, 84111, 66478, 114370];

    #[test]
    fn an_insertion_moves_few_cuts() {
        let before = noise(2, 1 << 20);
        let mut after = before.clone();
        after.splice(300_000..300_000, *b"sixteen new byte");
        let ids = |data: &[u8]| -> std::collections::HashSet<blake3::Hash> {
            chunks(ChunkerParams::default(), data)
                .map(|cut| blake3::hash(&data[cut.offset as usize..][..cut.len as usize]))
                .collect()
        };
        let (before, after) = (ids(&before), ids(&after));
        assert!(after.difference(&before).count() <= 2);
    }

    #[test]
    fn zero_runs_are_seen_in_blocks() {
        let mut data = vec![0; 5 * 4096 + 10];
        data[4096] = 1;
        data[3 * 4096 - 1] = 1;
        assert_eq!(
            split_zero_runs(&data, ZERO_GRANULARITY),
            [(0..4096, true), (4096..3 * 4096, false), (3 * 4096..5 * 4096 + 10, true)]
        );
        assert_eq!(split_zero_runs(&[], ZERO_GRANULARITY), []);
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for len in [0, 1, 127, 128, 129, 300] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in 0..len {
                data[at] = 0x80;
                assert!(!is_zero(&data), "{at} of {len}");
                data[at] = 0;
            }
        }
    }

    proptest! {
        #[test]
        fn a_stream_is_cut_like_the_whole(
            seed: u64,
            len in 0_usize..60_000,
            flat in 0_usize..20_000,
            blocks in prop::collection::vec(0_usize..9000, 1..20),
        ) {
            let mut data = noise(seed, len);
            // A stretch without any cut by content: chunks of the largest size.
            data.splice(len / 2..len / 2, vec![7; flat]);
            let whole: Vec<Cut> = chunks(small(), &data).collect();

            let mut chunker = StreamChunker::new(small());
            let mut cuts = Vec::new();
            let mut rest = &data[..];
            for block in blocks.iter().cycle() {
                if rest.is_empty() || blocks.iter().all(|block| *block == 0) {
                    break;
                }
                let (head, tail) = rest.split_at(rest.len().min(*block));
                cuts.extend(chunker.push(head));
                prop_assert!(chunker.carry.len() < 4096);
                rest = tail;
            }
            cuts.extend(chunker.push(rest));
            cuts.extend(chunker.finish());
            prop_assert_eq!(&cuts, &whole);

            let mut end = 0;
            for cut in &cuts {
                prop_assert_eq!(cut.offset, end);
                prop_assert!(cut.len > 0 && cut.len <= 4096);
                end += u64::from(cut.len);
            }
            prop_assert_eq!(end, data.len() as u64);
        }

        #[test]
        fn zero_runs_cover_everything_and_alternate(
            blocks in prop::collection::vec((any::<bool>(), 1_usize..40), 0..20),
        ) {
            let data: Vec<u8> =
                blocks.iter().flat_map(|(zero, len)| vec![u8::from(!zero); *len]).collect();
            let runs = split_zero_runs(&data, 16);
            let mut end = 0;
            for (run, zero) in &runs {
                prop_assert_eq!(run.start, end);
                prop_assert!(!run.is_empty());
                prop_assert_eq!(*zero, data[run.clone()].iter().all(|byte| *byte == 0));
                end = run.end;
            }
            prop_assert_eq!(end, data.len());
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }
}
