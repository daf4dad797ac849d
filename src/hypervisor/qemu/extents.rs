//! Lists of extents: built up from block status, and dirty stretches laid over allocation.
//!
//! Pure. Invariant: a list is ascending, without overlap, and never longer than its limit: beyond it,
//! neighbours are joined as data, gaps between them included, since to read more than was written is
//! always right and to read less never is.

use std::ops::Range;

use crate::hypervisor::Extent;

/// Most extents of one view: 192 MiB of memory.
pub(super) const EXTENTS_MAX: usize = 8 << 20;
/// Most questions about allocation for one delta: each is a round trip while the guest may be paused.
const QUESTIONS_MAX: usize = 1024;
/// Dirty stretches closer than this share a question at the least.
const QUESTION_GAP_BYTES: u64 = 1 << 20;

/// A growing list.
#[derive(Debug)]
pub(super) struct Extents {
    list: Vec<Extent>,
    limit: usize,
}

impl Extents {
    pub(super) fn new() -> Self {
        Self::with_limit(EXTENTS_MAX)
    }

    fn with_limit(limit: usize) -> Self {
        Self { list: Vec::new(), limit }
    }

    /// Adds a stretch that begins at or after the end of the last one.
    pub(super) fn push(&mut self, offset: u64, len: u64, zero: bool) {
        if len == 0 {
            return;
        }
        let full = self.list.len() >= self.limit;
        match self.list.last_mut() {
            Some(last) if last.zero == zero && last.offset + last.len == offset => last.len += len,
            Some(last) if full => {
                last.len = offset + len - last.offset;
                last.zero = false;
            }
            _ => self.list.push(Extent { offset, len, zero }),
        }
    }

    pub(super) fn finish(self) -> Vec<Extent> {
        self.list
    }
}

/// Joins dirty stretches to at most [`QUESTIONS_MAX`] ranges to ask about.
pub(super) fn questions(dirty: &[Extent]) -> Vec<Range<u64>> {
    let mut gap = QUESTION_GAP_BYTES;
    loop {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for extent in dirty {
            let end = extent.offset + extent.len;
            match ranges.last_mut() {
                Some(last) if extent.offset - last.end <= gap => last.end = end,
                _ => ranges.push(extent.offset..end),
            }
        }
        if ranges.len() <= QUESTIONS_MAX {
            return ranges;
        }
        gap = gap.saturating_mul(2);
    }
}

/// Cuts `dirty` where it is `zero`; both ascending and without overlap.
pub(super) fn mark_zeros(dirty: &[Extent], zero: &[Extent]) -> Vec<Extent> {
    let mut out = Extents::new();
    let mut zeros = zero.iter().peekable();
    for extent in dirty {
        let end = extent.offset + extent.len;
        let mut at = extent.offset;
        while at < end {
            while zeros.next_if(|z| z.offset + z.len <= at).is_some() {}
            let (stop, is_zero) = match zeros.peek() {
                Some(z) if z.offset <= at => ((z.offset + z.len).min(end), true),
                Some(z) => (z.offset.min(end), false),
                None => (end, false),
            };
            out.push(at, stop - at, is_zero);
            at = stop;
        }
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extents(bits: &[bool]) -> Vec<Extent> {
        let mut out = Extents::new();
        for (i, bit) in bits.iter().enumerate() {
            if *bit {
                out.push(i as u64 * 512, 512, true);
            }
        }
        out.finish()
    }

    #[test]
    fn a_full_list_grows_coarser_but_covers_everything() {
        let mut out = Extents::with_limit(2);
        out.push(0, 10, true);
        out.push(20, 10, false);
        out.push(30, 10, false);
        out.push(100, 10, true);
        let data = Extent { offset: 20, len: 90, zero: false };
        assert_eq!(out.finish(), [Extent { offset: 0, len: 10, zero: true }, data]);
    }

    #[test]
    fn scattered_writes_need_a_bounded_number_of_questions() {
        let dirty: Vec<Extent> = (0..100_000)
            .map(|i| Extent { offset: i * (8 << 20), len: 4096, zero: false })
            .collect();
        let ranges = questions(&dirty);
        assert!(ranges.len() <= QUESTIONS_MAX);
        assert_eq!(ranges[0].start, 0);
        assert_eq!(ranges[ranges.len() - 1].end, 99_999 * (8 << 20) + 4096);
        assert_eq!(questions(&dirty[..3]).len(), 3);
    }

    proptest! {
        #[test]
        fn dirty_bytes_stay_dirty_and_zeros_are_zeros(
            bits in prop::collection::vec(any::<(bool, bool)>(), 1..200),
        ) {
            let (dirty, zero): (Vec<bool>, Vec<bool>) = bits.iter().copied().unzip();
            let marked = mark_zeros(&extents(&dirty), &extents(&zero));
            for pair in marked.windows(2) {
                prop_assert!(pair[0].offset + pair[0].len <= pair[1].offset);
            }
            for (i, (dirty, zero)) in bits.iter().enumerate() {
                let at = i as u64 * 512;
                let found = marked.iter().find(|e| e.offset <= at && at < e.offset + e.len);
                prop_assert_eq!(found.map(|e| e.zero), dirty.then_some(*zero));
            }
        }
    }
}
