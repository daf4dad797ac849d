//! Zeros: what is never sent, and not written where it can be a hole.
//!
//! Invariant: nothing that has a byte other than 0 is taken for zeros.

use std::ops::Range;

/// The granularity at which zeros are looked for: a page, and the smallest block of a disk that
/// file systems leave untouched.
pub const ZERO_GRANULARITY: usize = 4096;

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
