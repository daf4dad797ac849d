//! Where on a disk there is data, in whole blocks, parcel by parcel.
//!
//! Invariant: data and zeros are apart from each other and cover what the extents cover; data begins
//! and ends with blocks (or with the disk), so zeros that share a block with data are read with it.

use std::future::Future;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use longhaul_dedup::blocks::{self, BLOCK_BYTES, PARCEL_BYTES, Scan};
use longhaul_dedup::grains::{self, GrainId};
use longhaul_dedup::offer::MAX_SAMPLES;
use longhaul_dedup::recipe::GrainSample;
use longhaul_dedup::summary::{Summary, parcel_range};

use super::super::error::MigrationError;
use crate::hypervisor::{Extent, HypervisorError};

/// One read; the hypervisor's export takes at most 4 MiB.
const READ_BYTES: u64 = 512 << 10;
/// Reads of one parcel under way at once.
const READS_AHEAD: usize = 8;

/// The extents of a disk, made of blocks.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    bytes: u64,
    data: Vec<Range<u64>>,
    zeros: Vec<Range<u64>>,
}

/// What a layout has of one parcel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) parcel: u64,
    pub(super) place: Range<u64>,
    pub(super) data: Vec<Range<u64>>,
    pub(super) zeros: Vec<Range<u64>>,
}

/// A part that was read and cut.
pub(super) struct Parcel {
    pub(super) part: Part,
    pub(super) scan: Scan,
    /// Everything that is zeros, holes or not.
    pub(super) zeros: Vec<Range<u64>>,
    /// What was read, unless it was let go.
    pub(super) stretches: Vec<(u64, Bytes)>,
}

fn bytes_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ if range.is_empty() => {}
        _ => ranges.push(range),
    }
}

/// What of ascending ranges lies within `place`.
fn within(ranges: &[Range<u64>], place: &Range<u64>) -> Vec<Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= place.start);
    let touching = ranges[first..].iter().take_while(|range| range.start < place.end);
    touching.map(|range| range.start.max(place.start)..range.end.min(place.end)).collect()
}

impl Layout {
    /// Of ascending extents of a disk of `bytes`.
    pub(super) fn of(extents: &[Extent], bytes: u64) -> Self {
        let block = BLOCK_BYTES as u64;
        let mut data = Vec::new();
        for extent in extents.iter().filter(|extent| !extent.zero && extent.len > 0) {
            let end = (extent.offset + extent.len).next_multiple_of(block).min(bytes);
            push(&mut data, extent.offset / block * block..end);
        }
        let mut zeros = Vec::new();
        let mut next = 0;
        for extent in extents.iter().filter(|extent| extent.zero) {
            let (mut at, end) = (extent.offset, extent.offset + extent.len);
            // Data that was widened to whole blocks is taken out.
            while at < end {
                while next < data.len() && data[next].end <= at {
                    next += 1;
                }
                match data.get(next) {
                    Some(range) if range.start <= at => at = range.end.min(end),
                    Some(range) if range.start < end => {
                        push(&mut zeros, at..range.start);
                        at = range.start;
                    }
                    _ => {
                        push(&mut zeros, at..end);
                        at = end;
                    }
                }
            }
        }
        Self { bytes, data, zeros }
    }

    /// Bytes that it covers.
    pub(super) fn covered(&self) -> u64 {
        bytes_of(&self.data) + bytes_of(&self.zeros)
    }

    /// Whether it is all of the disk.
    pub(super) fn is_whole(&self) -> bool {
        self.covered() == self.bytes
    }

    /// What it has of a parcel, if the disk has that.
    pub(super) fn part(&self, parcel: u64) -> Option<Part> {
        let place = parcel_range(parcel, self.bytes)?;
        let (data, zeros) = (within(&self.data, &place), within(&self.zeros, &place));
        Some(Part { parcel, place, data, zeros })
    }

    /// Its parts, in order, those left out that have nothing.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        (0..self.bytes.div_ceil(PARCEL_BYTES))
            .filter_map(|parcel| self.part(parcel))
            .filter(|part| !part.data.is_empty() || !part.zeros.is_empty())
    }
}

impl Part {
    /// Whether it is all of its parcel.
    pub(super) fn is_whole(&self) -> bool {
        bytes_of(&self.data) + bytes_of(&self.zeros) == self.place.end - self.place.start
    }

    /// Reads its data and cuts it.
    pub(super) async fn read<F, R>(self, read: F) -> Result<Parcel, MigrationError>
    where
        F: Fn(u64, u32) -> R,
        R: Future<Output = Result<Bytes, HypervisorError>>,
    {
        let reads: Vec<(usize, u64, u32)> = self
            .data
            .iter()
            .enumerate()
            .flat_map(|(stretch, range)| {
                let starts = range.clone().step_by(READ_BYTES as usize);
                starts.map(move |at| (stretch, at, (range.end - at).min(READ_BYTES) as u32))
            })
            .collect();
        let mut contents: Vec<BytesMut> = self
            .data
            .iter()
            .map(|range| BytesMut::with_capacity((range.end - range.start) as usize))
            .collect();
        let mut done = stream::iter(reads)
            .map(|(stretch, offset, len)| {
                let reading = read(offset, len);
                async move { (stretch, reading.await) }
            })
            .buffered(READS_AHEAD);
        while let Some((stretch, data)) = done.next().await {
            contents[stretch].extend_from_slice(&data?);
        }
        drop(done);
        let stretches: Vec<(u64, Bytes)> = self
            .data
            .iter()
            .zip(contents)
            .map(|(range, content)| (range.start, content.freeze()))
            .collect();
        let cutting = tokio::task::spawn_blocking(move || (blocks::scan(&stretches), stretches));
        let (scan, stretches) = cutting.await.expect("cutting does not panic");
        let mut zeros = [&self.zeros[..], &scan.zeros].concat();
        zeros.sort_by_key(|range| range.start);
        let mut joined = Vec::new();
        zeros.into_iter().for_each(|range| push(&mut joined, range));
        Ok(Parcel { part: self, scan, zeros: joined, stretches })
    }
}

impl Parcel {
    /// What it is, for comparison. Only of a whole one.
    pub(super) fn summary(&self) -> Summary {
        Summary::of(&self.part.place, self.scan.pieces.iter().map(blocks::Piece::entry))
    }

    /// Bytes of its pieces.
    pub(super) fn data_bytes(&self) -> u64 {
        self.scan.pieces.iter().map(|piece| u64::from(piece.len)).sum()
    }

    /// Bytes of its zeros.
    pub(super) fn zero_bytes(&self) -> u64 {
        bytes_of(&self.zeros)
    }

    /// Samples of its grains: of runs of pieces, so that none goes over zeros.
    pub(super) fn grains(&self) -> Vec<GrainSample> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for piece in &self.scan.pieces {
            push(&mut runs, piece.offset..piece.offset + u64::from(piece.len));
        }
        let of_run = |run: Range<u64>| {
            let data = self.kept(run.start, (run.end - run.start) as u32).unwrap_or_default();
            let sample = |(at, id)| GrainSample { offset: run.start + at as u64, id };
            grains::samples(&data).map(sample).collect::<Vec<_>>()
        };
        runs.into_iter().flat_map(of_run).collect()
    }

    /// Samples of the grains of some of its pieces, as a list of their blocks has them. None of what
    /// was not kept.
    pub(super) fn samples_of(&self, pieces: &[usize]) -> Vec<(u64, GrainId)> {
        let mut begin = 0;
        let mut samples = Vec::new();
        for piece in pieces.iter().map(|piece| &self.scan.pieces[*piece]) {
            let data = self.kept(piece.offset, piece.len).unwrap_or_default();
            samples.extend(grains::samples(&data).map(|(at, id)| (begin + at as u64, id)));
            begin += u64::from(piece.len);
        }
        samples.truncate(MAX_SAMPLES);
        samples
    }

    /// These bytes of its data, if they were kept.
    pub(super) fn kept(&self, offset: u64, len: u32) -> Option<Bytes> {
        let (start, data) = self
            .stretches
            .iter()
            .find(|(start, data)| (*start..start + data.len() as u64).contains(&offset))?;
        let at = (offset - start) as usize;
        Some(data.slice(at..at + len as usize))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[tokio::test]
    async fn parts_are_read_and_cut() {
        let extents = [
            Extent { offset: 0, len: 5000, zero: false },
            Extent { offset: 5000, len: (32 << 20) - 5000, zero: true },
            Extent { offset: 32 << 20, len: 1 << 20, zero: false },
        ];
        let layout = Layout::of(&extents, 33 << 20);
        let parts: Vec<Part> = layout.parts().collect();
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(Part::is_whole));
        let reads = |offset: u64, len: u32| async move {
            assert!(offset + u64::from(len) <= 8192 || offset >= 32 << 20);
            let fill = if offset < 500_000 + (32 << 20) { 0 } else { 7 };
            Ok(Bytes::from(vec![fill; len as usize]))
        };
        let summaries: Vec<(Summary, u64)> = stream::iter(parts)
            .then(|part| async move {
                let parcel = part.read(reads).await.unwrap();
                (parcel.summary(), parcel.zero_bytes())
            })
            .collect()
            .await;
        assert_eq!(summaries[0], (Summary::Zeros, 16 << 20));
        assert_eq!(summaries[1], (Summary::Zeros, 16 << 20));
        assert_ne!(summaries[2].0, Summary::Zeros);
    }

    proptest! {
        #[test]
        fn data_and_zeros_cover_what_the_extents_do(
            lens in prop::collection::vec((1_u64..20_000_000, 0_u8..3), 0..12),
        ) {
            let mut offset = 0;
            let mut extents = Vec::new();
            for (len, kind) in lens {
                if kind < 2 {
                    extents.push(Extent { offset, len, zero: kind == 0 });
                }
                offset += len;
            }
            let layout = Layout::of(&extents, offset);
            let mut last = 0;
            let mut covered = 0;
            for part in layout.parts() {
                let mut all = [&part.data[..], &part.zeros].concat();
                all.sort_by_key(|range| range.start);
                for range in &all {
                    prop_assert!(range.start >= last && range.start < range.end);
                    last = range.end;
                }
                prop_assert!(last <= part.place.end);
                for range in &part.data {
                    prop_assert!(range.start.is_multiple_of(4096));
                    prop_assert!(range.end.is_multiple_of(4096) || range.end == offset);
                }
                covered += bytes_of(&all);
            }
            prop_assert_eq!(covered, layout.covered());
            for extent in extents {
                let place = extent.offset..extent.offset + extent.len;
                let data = bytes_of(&within(&layout.data, &place));
                let zeros = bytes_of(&within(&layout.zeros, &place));
                prop_assert_eq!(data + zeros, extent.len);
                prop_assert!(extent.zero || zeros == 0);
            }
        }
    }
}
