//! Several runs into one, in memory that does not depend on their size.
//!
//! Invariant: what comes out ascends, has no entry twice, no more than [`MAX_PLACES`] of one hash and none
//! of an image that was dropped. Which runs are merged is decided by their sizes alone.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    io,
};

use super::{
    MAX_PLACES,
    format::Entry,
    run::{Run, RunReader, RunWriter},
};

/// A run is merged with the smaller ones unless it is so many times as large as all of them together:
/// with one run more the index is at least four times as large.
const RATIO: u64 = 3;
/// Smaller runs count as if they had so many entries: they are rewritten in no time (16 MiB), and
/// would cost every look-up a page each. Tests want several runs of few entries.
const SMALL_RUN: u64 = if cfg!(test) { 1 << 6 } else { 1 << 20 };

/// How many of the smallest runs are to become one, by the runs' entries in descending order; 1 or 0 if
/// none need to.
pub(super) fn to_merge(descending: &[u64]) -> usize {
    let (mut sum, mut count) = (0_u64, 0);
    for (smaller, entries) in descending.iter().rev().enumerate() {
        if smaller > 0 && *entries < RATIO * sum {
            count = smaller + 1;
        }
        sum = (sum + entries).max(SMALL_RUN);
    }
    count
}

/// A run that goes into a merge.
pub(super) struct Input<'a> {
    pub(super) run: &'a Run,
    /// The image that its entries get, if they are not numbered yet.
    pub(super) image: Option<u16>,
}

/// Writes what the inputs have, but for entries of `dropped` images. Says which inputs have damaged pages.
pub(super) fn merge(
    inputs: &[Input<'_>],
    dropped: &BTreeSet<u16>,
    out: &mut RunWriter,
) -> io::Result<Vec<usize>> {
    let mut readers: Vec<RunReader<'_>> = inputs.iter().map(|input| input.run.reader()).collect();
    let mut next = |number: usize| -> io::Result<Option<Reverse<(Entry, usize)>>> {
        let entry = readers[number].next()?;
        Ok(entry.map(|entry| {
            let entry = inputs[number].image.map_or(entry, |image| entry.of_image(image));
            Reverse((entry, number))
        }))
    };
    let mut heads = BinaryHeap::with_capacity(inputs.len());
    for number in 0..inputs.len() {
        heads.extend(next(number)?);
    }
    let (mut last, mut of_key) = (None::<Entry>, 0);
    while let Some(Reverse((entry, number))) = heads.pop() {
        heads.extend(next(number)?);
        let same_key = last.is_some_and(|last| last.key == entry.key);
        if last == Some(entry)
            || dropped.contains(&entry.image())
            || (same_key && of_key == MAX_PLACES)
        {
            continue;
        }
        of_key = if same_key { of_key + 1 } else { 1 };
        last = Some(entry);
        out.push(entry)?;
    }
    let damaged = readers.iter().enumerate().filter(|(_, reader)| reader.damaged() > 0);
    Ok(damaged.map(|(number, _)| number).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_stay_few_whatever_is_added(added in prop::collection::vec(1_u64..40_000_000, 1..200)) {
            let mut runs: Vec<u64> = Vec::new();
            let mut total = 0;
            for entries in added {
                total += entries;
                runs.push(entries);
                runs.sort_by_key(|entries| Reverse(*entries));
                let count = to_merge(&runs);
                if count > 1 {
                    let merged = runs.split_off(runs.len() - count).into_iter().sum();
                    runs.push(merged);
                    runs.sort_by_key(|entries| Reverse(*entries));
                }
                prop_assert_eq!(runs.iter().sum::<u64>(), total);
                let limit = 2 + (total / SMALL_RUN).max(1).ilog(RATIO + 1) as usize;
                prop_assert!(runs.len() <= limit, "{:?}", runs);
            }
        }
    }
}
