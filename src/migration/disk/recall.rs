//! Disks that nobody wrote to since they were recorded: compared without being read.
//!
//! Invariant: three round trips, however large the disk: one for its beginning, one for ranges of it, one for
//! the parcels of those that differ. What the record does not vouch for, and what
//! the target has otherwise, is left to be read.

use std::ops::Range;

use bytes::Bytes;
use longhaul_dedup::offer::Answer;
use longhaul_dedup::summary::{MAX_SUMMARIES, Summaries, Summary};
use longhaul_transport::Class;

use super::super::error::MigrationError;
use super::super::message::{BulkHeader, ToSource};
use super::layout::Part;
use super::record::Recalled;
use super::send::DiskSender;

/// Parcels with data in one message: the target reads those of which nothing vouches there.
const WITH_DATA_AT_ONCE: usize = 256;

impl DiskSender<'_> {
    /// Compares what is recorded of the parts of a disk; gives those that must be read.
    pub(super) async fn recall(
        &self,
        disk: u16,
        parts: Vec<Part>,
        class: Class,
    ) -> Result<Vec<Part>, MigrationError> {
        let recalled = self.record.recall(disk, &parts);
        let batches = batches(&parts, &recalled);
        let mut is_same = vec![false; parts.len()];
        let mut compare = async |now: &[Range<usize>], as_one| {
            self.compare((disk, class), (&parts, &recalled), now, as_one, &mut is_same).await
        };
        // The first alone: a target that has nothing is not told of everything.
        let (first, rest) = batches.split_at(batches.len().min(1));
        if !compare(first, false).await?.is_fresh {
            let ranges = compare(rest, true).await?;
            if !ranges.is_fresh {
                compare(&ranges.differ, false).await?;
            }
        }
        for ((part, recalled), _) in
            parts.iter().zip(&recalled).zip(&is_same).filter(|(_, is_same)| **is_same)
        {
            let data = recalled.map_or(0, |recalled| recalled.data_bytes);
            self.meter.disk_known(data);
            self.meter.disk_zero(part.place.end - part.place.start - data);
        }
        let mut is_same = is_same.into_iter();
        Ok(parts.into_iter().filter(|_| !is_same.next().unwrap_or_default()).collect())
    }

    /// Asks about batches of parts, each part by itself or each batch as one.
    async fn compare(
        &self,
        (disk, class): (u16, Class),
        (parts, recalled): (&[Part], &[Option<Recalled>]),
        batches: &[Range<usize>],
        as_one: bool,
        is_same: &mut [bool],
    ) -> Result<Compared, MigrationError> {
        let first = self.link.disk_items();
        let asking = async {
            for batch in batches {
                let parcels = recalled[batch.clone()].iter().flatten().map(|r| r.summary).collect();
                let summaries = Summaries { disk, first: parts[batch.start].parcel, parcels };
                let item = self.link.next_disk_item();
                let (header, body) = match as_one {
                    true => {
                        let Summaries { first, parcels, .. } = &summaries;
                        (BulkHeader::range(item, disk, *first, parcels), Bytes::new())
                    }
                    false => (BulkHeader::Summaries { item }, summaries.encode()),
                };
                self.link.send_bulk(class, &header, body).await?;
            }
            Ok::<_, MigrationError>(())
        };
        let hearing = async {
            let mut compared = Compared::default();
            for _ in batches {
                let ToSource::Want { item, wanted, plain, .. } = self.link.want().await? else {
                    return Err(self.bad("it answers what was not asked"));
                };
                let batch = item.checked_sub(first).and_then(|at| batches.get(at as usize));
                let batch = batch.ok_or_else(|| self.bad("it answers what was not asked"))?;
                let answers = if as_one { 1 } else { batch.len() };
                let differs = Answer::decode(&wanted, answers).map_err(|error| self.bad(error))?.0;
                let of_parts = differs.iter().cycle().take(batch.len());
                for (part, differs) in batch.clone().zip(of_parts) {
                    is_same[part] = !differs;
                }
                if differs.contains(&true) {
                    compared.differ.push(batch.clone());
                }
                compared.is_fresh |= plain;
            }
            Ok(compared)
        };
        let ((), compared) = tokio::try_join!(asking, hearing)?;
        Ok(compared)
    }

    fn bad(&self, detail: impl ToString) -> MigrationError {
        MigrationError::protocol(self.link.peer(), detail)
    }
}

/// What came of asking about batches.
#[derive(Default)]
struct Compared {
    /// Batches of which something differs.
    differ: Vec<Range<usize>>,
    /// The target has nothing.
    is_fresh: bool,
}

/// Parts side by side that are recalled whole, as many as go in one message.
fn batches(parts: &[Part], recalled: &[Option<Recalled>]) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut with_data = 0;
    for (at, (part, recalled)) in parts.iter().zip(recalled).enumerate() {
        let Some(recalled) = recalled.filter(|_| part.is_whole()) else { continue };
        let has_data = usize::from(recalled.summary != Summary::Zeros);
        let goes_on = batches.last().is_some_and(|last| {
            last.end == at
                && parts[at - 1].parcel + 1 == part.parcel
                && last.len() < MAX_SUMMARIES
                && with_data + has_data <= WITH_DATA_AT_ONCE
                && (batches.len() > 1 || with_data == 0)
        });
        match batches.last_mut() {
            Some(last) if goes_on => last.end = at + 1,
            _ => {
                batches.push(at..at + 1);
                with_data = 0;
            }
        }
        with_data += has_data;
    }
    batches
}
