//! From records to pages whose every byte is proven.
//!
//! Invariant: nothing leaves [`PageBatch::rebuild`] before the hash over all of it matched.

use std::collections::HashMap;

use super::{BlockAt, ContentHasher, PageAt, PageBatch, PageRecord};
use crate::{
    delta,
    pages::{Page, PageHash, hash_pages},
};

/// What to write where, proven to be what the source has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placed {
    /// Zeros.
    Zero {
        /// The first page.
        at: PageAt,
        /// Pages in a row.
        count: u32,
    },
    /// A page with content; it may be zero all the same.
    Page {
        /// The page.
        at: PageAt,
        /// Its content.
        content: Page,
        /// Its content's hash.
        hash: PageHash,
    },
}

/// A batch whose pages cannot be had. Nothing of it may be written: ask for its pages in full.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RebuildError {
    /// It refers to a page of which the target knows no content.
    #[error("region {} page {} refers to region {} page {}, which is not here: ask for the \
             batch again in full", at.region, at.page, like.region, like.page)]
    Missing {
        /// The page to rebuild.
        at: PageAt,
        /// The page that it refers to.
        like: PageAt,
    },
    /// It refers to a block that cannot be read.
    #[error("region {} page {} refers to block {} of disk {}, which is not here: ask for the \
             batch again in full", at.region, at.page, block.block, block.disk)]
    MissingBlock {
        /// The page to rebuild.
        at: PageAt,
        /// The block that it refers to.
        block: BlockAt,
    },
    /// The pages are not what the source has: a reference or difference met other content than it
    /// was made for, or bytes were damaged.
    #[error("the pages of a batch do not hash to what the source has: ask for it again in full")]
    Mismatch,
}

impl PageBatch {
    /// Rebuilds the batch's pages and proves them.
    ///
    /// `last` gives the content that the target last got for a page in an earlier batch, zeros
    /// included, and `None` if it got none or kept none. `block` gives what a block of a disk holds, and
    /// is asked in the order of the records.
    pub fn rebuild(
        self,
        mut last: impl FnMut(PageAt) -> Option<Page>,
        mut block: impl FnMut(BlockAt) -> Option<Page>,
    ) -> Result<Vec<Placed>, RebuildError> {
        let mut earlier = Earlier::default();
        let mut contents: Vec<Page> = Vec::with_capacity(self.records.len());
        for (number, record) in self.records.iter().enumerate() {
            let at = record.at();
            let content = match record {
                PageRecord::Zero { count, .. } => {
                    earlier.runs.push((number, at, *count));
                    continue;
                }
                PageRecord::Full { content, .. } => content.clone(),
                PageRecord::Same { like, .. } => earlier
                    .content(*like, &contents)
                    .or_else(|| last(*like))
                    .ok_or(RebuildError::Missing { at, like: *like })?,
                PageRecord::Block { block: place, .. } => {
                    block(*place).ok_or(RebuildError::MissingBlock { at, block: *place })?
                }
                PageRecord::Delta { delta, .. } => {
                    let base = earlier
                        .content(at, &contents)
                        .or_else(|| last(at))
                        .ok_or(RebuildError::Missing { at, like: at })?;
                    let mut bytes = *base.as_array();
                    delta::apply(&mut bytes, delta);
                    Page::from(&bytes)
                }
            };
            earlier.pages.insert(at, (number, contents.len()));
            contents.push(content);
        }
        self.prove(contents)
    }

    fn prove(self, contents: Vec<Page>) -> Result<Vec<Placed>, RebuildError> {
        let arrays: Vec<_> = contents.iter().map(Page::as_array).collect();
        let hashes = hash_pages(&arrays);
        let mut proven = contents.into_iter().zip(hashes);
        let mut hasher = ContentHasher::new();
        let mut placed = Vec::with_capacity(self.records.len());
        for record in &self.records {
            let at = record.at();
            if let PageRecord::Zero { count, .. } = record {
                hasher.zero(at, *count);
                placed.push(Placed::Zero { at, count: *count });
            } else {
                let (content, hash) =
                    proven.next().expect("each record that is no run has its content");
                hasher.page(at, &hash);
                placed.push(Placed::Page { at, content, hash });
            }
        }
        if hasher.finish() == self.content_hash { Ok(placed) } else { Err(RebuildError::Mismatch) }
    }
}

/// What earlier records of the same batch say of a page.
#[derive(Default)]
struct Earlier {
    /// The last record about a page, and its place among the contents.
    pages: HashMap<PageAt, (usize, usize)>,
    /// Record, first page and length of each zero run. Searched one by one: who refers to zeros
    /// could have sent zeros.
    runs: Vec<(usize, PageAt, u32)>,
}

impl Earlier {
    fn content(&self, at: PageAt, contents: &[Page]) -> Option<Page> {
        let page = self.pages.get(&at);
        let run = self.runs.iter().rev().find(|(_, first, count)| {
            let distance = at.page.checked_sub(first.page);
            first.region == at.region && distance.is_some_and(|pages| pages < u64::from(*count))
        });
        match (page, run) {
            (Some((record, place)), run) if run.is_none_or(|run| run.0 < *record) => {
                Some(contents[*place].clone())
            }
            (_, Some(_)) => Some(Page::zero()),
            (_, None) => None,
        }
    }
}
