//! Staging: pages that were read from the hypervisor and not yet sent.
//!
//! Invariant: at most one version of a page waits here, the newest. A page that comes again before
//! its turn replaces the older version and goes to the back of the queue, so what changes often
//! waits and what is cold goes first. Bounded by the reader, which asks [`Staging::bytes`] before it
//! reads on.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

use crate::hypervisor::PAGE_BYTES;

/// Bytes that one staged page costs beside its content: map entry, queue entry, buffer header.
const ENTRY_BYTES: u64 = 96;
/// Stale queue entries that are tolerated before the queue is rebuilt.
const STALE_ENTRIES_MAX: usize = 4096;

/// A page of the guest: region in the high 16 bits, page number in the low 48.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageKey(u64);

impl PageKey {
    /// Page `page` of region `region`.
    pub fn new(region: u16, page: u64) -> Self {
        debug_assert!(page < 1 << 48, "page numbers are bounded by the layout");
        Self(u64::from(region) << 48 | page)
    }

    /// Index of the region.
    pub fn region(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// Number of the page in its region.
    pub fn page(self) -> u64 {
        self.0 & ((1 << 48) - 1)
    }
}

/// A page on its way; no content means zeros.
pub type StagedPage = (PageKey, Option<Bytes>);

#[derive(Debug)]
struct Entry {
    content: Option<Bytes>,
    stamp: u64,
}

/// The staging area.
#[derive(Debug, Default)]
pub struct Staging {
    pages: HashMap<PageKey, Entry>,
    /// Oldest first. An entry whose stamp is not its page's any more is stale and skipped.
    queue: VecDeque<(PageKey, u64)>,
    bytes: u64,
    stamp: u64,
    superseded_bytes: u64,
}

impl Staging {
    /// Stages a page's newest version.
    pub fn put(&mut self, key: PageKey, content: Option<Bytes>) {
        self.stamp += 1;
        self.bytes += cost(content.as_ref());
        self.queue.push_back((key, self.stamp));
        if let Some(old) = self.pages.insert(key, Entry { content, stamp: self.stamp }) {
            self.bytes -= cost(old.content.as_ref());
            self.superseded_bytes += PAGE_BYTES as u64;
        }
        if self.queue.len() > self.pages.len() + STALE_ENTRIES_MAX.max(self.pages.len()) {
            let pages = &self.pages;
            self.queue.retain(|(key, stamp)| is_current(pages, *key, *stamp));
        }
    }

    /// Takes the pages that waited longest: at most `max_pages`, and content of at most
    /// `max_bytes`, in ascending order.
    pub fn take(&mut self, max_pages: usize, max_bytes: usize) -> Vec<StagedPage> {
        let mut taken = Vec::new();
        let mut content_bytes = 0;
        while taken.len() < max_pages && content_bytes < max_bytes {
            let Some((key, stamp)) = self.queue.pop_front() else { break };
            if !is_current(&self.pages, key, stamp) {
                continue;
            }
            let Some(entry) = self.pages.remove(&key) else { continue };
            self.bytes -= cost(entry.content.as_ref());
            content_bytes += entry.content.as_ref().map_or(0, Bytes::len);
            taken.push((key, entry.content));
        }
        taken.sort_unstable_by_key(|(key, _)| *key);
        taken
    }

    /// Memory in use, bookkeeping included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages that wait.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Bytes of older page versions that were replaced here and so never sent.
    pub fn superseded_bytes(&self) -> u64 {
        self.superseded_bytes
    }
}

fn is_current(pages: &HashMap<PageKey, Entry>, key: PageKey, stamp: u64) -> bool {
    pages.get(&key).is_some_and(|entry| entry.stamp == stamp)
}

fn cost(content: Option<&Bytes>) -> u64 {
    ENTRY_BYTES + content.map_or(0, |content| content.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn page(fill: u8) -> Option<Bytes> {
        Some(Bytes::from(vec![fill; PAGE_BYTES]))
    }

    #[test]
    fn the_newest_version_replaces_the_one_that_waits() {
        let mut staging = Staging::default();
        staging.put(PageKey::new(0, 1), page(1));
        staging.put(PageKey::new(0, 2), page(2));
        staging.put(PageKey::new(0, 1), page(3));
        assert_eq!(staging.superseded_bytes(), PAGE_BYTES as u64);
        // The page that changed went to the back.
        assert_eq!(staging.take(1, usize::MAX), [(PageKey::new(0, 2), page(2))]);
        assert_eq!(staging.take(9, usize::MAX), [(PageKey::new(0, 1), page(3))]);
        assert_eq!(staging.bytes(), 0);
    }

    #[test]
    fn a_page_that_changes_all_the_time_does_not_grow_the_queue() {
        let mut staging = Staging::default();
        for round in 0..100_000_u32 {
            staging.put(PageKey::new(0, 7), page(round as u8));
        }
        assert!(staging.queue.len() <= 2 * STALE_ENTRIES_MAX);
        assert_eq!(staging.len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_was_put_last(
            ops in proptest::collection::vec((0u64..20, any::<Option<u8>>(), any::<bool>()), 1..300),
        ) {
            let mut staging = Staging::default();
            let mut expected = BTreeMap::new();
            let mut received = BTreeMap::new();
            for (number, fill, take) in ops {
                let key = PageKey::new(3, number);
                staging.put(key, fill.and_then(page));
                expected.insert(key, fill.and_then(page));
                if take {
                    received.extend(staging.take(3, 2 * PAGE_BYTES));
                }
            }
            while !staging.is_empty() {
                received.extend(staging.take(3, 2 * PAGE_BYTES));
            }
            prop_assert_eq!(received, expected);
            prop_assert_eq!(staging.bytes(), 0);
        }
    }
}
