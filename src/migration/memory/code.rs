//! Chooses the form in which each page crosses the WAN.
//!
//! Invariant: records are decided, and the state updated, in the order in which the target applies
//! them; so a page that is named as equal, or as the base of a difference, has at that moment at the
//! target just the content that the state says. The state is hashes, never contents: about 200
//! bytes for a page that is not zero (5 % of it), 8 for one that is.

use std::collections::HashMap;
use std::sync::Arc;

use longhaul_dedup::delta::{self, SubHashes};
use longhaul_dedup::pagebatch::{ContentHash, ContentHasher, PageAt, PageRecord};
use longhaul_dedup::pages::{PAGE_BYTES, Page, PageHash, hash_pages};

use super::super::report::Saved;
use super::super::staging::{PageKey, StagedPage};
use super::blocks::{KnownBlocks, short};
use crate::hypervisor::MemoryLayout;

/// A difference larger than this is not worth its form: what is left of the page compresses better
/// together with it.
const DELTA_BYTES_MAX: usize = PAGE_BYTES * 3 / 4;

/// What the target has of a page.
enum AtTarget {
    Unsent,
    Zero,
    Content(Box<Sent>),
}

struct Sent {
    hash: PageHash,
    parts: SubHashes,
}

/// What a batch of pages came to.
pub(super) struct Coded {
    /// For the target, in order.
    pub(super) records: Vec<PageRecord>,
    /// What the target must have after each of them.
    pub(super) content_hash: ContentHash,
    /// Payload bytes that were dealt with.
    pub(super) payload: u64,
    /// What each form saved; compression is not known here.
    pub(super) saved: Saved,
    /// Bytes of content in the records, before compression.
    pub(super) content: u64,
    /// The pages that go as names of blocks, in order.
    pub(super) named: Vec<Page>,
}

/// A batch in the making.
#[derive(Default)]
struct Batch {
    records: Vec<PageRecord>,
    saved: Saved,
    content: u64,
    named: Vec<Page>,
    /// Pages may go as names of blocks.
    names: bool,
}

/// The source's knowledge of what the target has.
pub(super) struct PageCoder {
    regions: Vec<Vec<AtTarget>>,
    /// A page that had this content when it was last sent; the first 8 bytes of its hash, to be
    /// checked against that page's state.
    by_hash: HashMap<u64, PageKey>,
    blocks: Arc<KnownBlocks>,
}

impl PageCoder {
    /// Nothing sent yet. The layout's sizes were bounded by whoever read it.
    pub(super) fn new(layout: &MemoryLayout, blocks: Arc<KnownBlocks>) -> Self {
        let regions = layout
            .regions
            .iter()
            .map(|region| {
                let pages = region.bytes.div_ceil(PAGE_BYTES as u64) as usize;
                (0..pages).map(|_| AtTarget::Unsent).collect()
            })
            .collect();
        Self { regions, by_hash: HashMap::new(), blocks }
    }

    /// Decides the form of each page, in order. With `names` a page may go as the name of a block that
    /// the target has on a disk.
    pub(super) fn code(&mut self, pages: Vec<StagedPage>, names: bool) -> Coded {
        let contents: Vec<(PageKey, Option<Page>)> = pages
            .into_iter()
            .map(|(key, content)| {
                // The hypervisor's parser hands out whole pages only.
                (key, content.and_then(|content| Page::try_from(content).ok()))
            })
            .collect();
        let hashes = {
            let arrays: Vec<&[u8; PAGE_BYTES]> = contents
                .iter()
                .filter_map(|(_, content)| content.as_ref().map(Page::as_array))
                .collect();
            hash_pages(&arrays)
        };
        let mut hashes = hashes.into_iter();
        let payload = (contents.len() * PAGE_BYTES) as u64;
        let mut coded = Batch { names, ..Batch::default() };
        for (key, content) in contents {
            match content {
                None => self.code_zero(key, &mut coded),
                Some(page) => {
                    let hash = hashes.next().expect("one hash was made for each content");
                    self.code_content(key, page, hash, &mut coded);
                }
            }
        }
        let Batch { records, saved, content, named, .. } = coded;
        let mut hasher = ContentHasher::new();
        for record in &records {
            match record {
                PageRecord::Zero { at, count } => hasher.zero(*at, *count),
                other => {
                    let key = PageKey::new(other.at().region, other.at().page);
                    // A batch has each page once: the state is that of its record.
                    if let AtTarget::Content(sent) = self.state(key) {
                        hasher.page(other.at(), &sent.hash);
                    }
                }
            }
        }
        Coded { records, content_hash: hasher.finish(), payload, saved, content, named }
    }

    fn code_zero(&mut self, key: PageKey, coded: &mut Batch) {
        coded.saved.memory_zero_bytes += PAGE_BYTES as u64;
        let state = self.state(key);
        if matches!(state, AtTarget::Zero) {
            return;
        }
        *state = AtTarget::Zero;
        let at = place(key);
        if let Some(PageRecord::Zero { at: first, count }) = coded.records.last_mut()
            && first.region == at.region
            && first.page + u64::from(*count) == at.page
        {
            *count += 1;
            return;
        }
        coded.records.push(PageRecord::Zero { at, count: 1 });
    }

    fn code_content(&mut self, key: PageKey, page: Page, hash: PageHash, coded: &mut Batch) {
        let at = place(key);
        let known = self.holder_of(&hash);
        let block = if coded.names && known.is_none() { self.blocks.find(&hash) } else { None };
        let state = self.state(key);
        if matches!(state, AtTarget::Content(sent) if sent.hash == hash) {
            // It was written to, but not changed.
            coded.saved.memory_repeated_bytes += PAGE_BYTES as u64;
            return;
        }
        let parts = SubHashes::of(page.as_array());
        let record = if let Some(holder) = known {
            coded.saved.memory_repeated_bytes += PAGE_BYTES as u64;
            PageRecord::Same { at, like: place(holder) }
        } else if let Some(block) = block {
            coded.saved.memory_on_disk_bytes += PAGE_BYTES as u64;
            coded.named.push(page);
            PageRecord::Block { at, block }
        } else {
            let delta = match state {
                AtTarget::Content(sent) => Some(delta::encode(page.as_array(), &sent.parts)),
                AtTarget::Unsent | AtTarget::Zero => None,
            };
            match delta {
                Some(delta) if delta.encoded_bytes() <= DELTA_BYTES_MAX => {
                    let bytes = delta.encoded_bytes() as u64;
                    coded.saved.memory_delta_bytes += PAGE_BYTES as u64 - bytes;
                    coded.content += bytes;
                    PageRecord::Delta { at, delta }
                }
                _ => {
                    coded.content += PAGE_BYTES as u64;
                    PageRecord::Full { at, content: page }
                }
            }
        };
        *state = AtTarget::Content(Box::new(Sent { hash, parts }));
        self.by_hash.insert(short(&hash), key);
        coded.records.push(record);
    }

    /// A page that has this content at the target now.
    fn holder_of(&self, hash: &PageHash) -> Option<PageKey> {
        let key = *self.by_hash.get(&short(hash))?;
        match self.regions.get(usize::from(key.region()))?.get(key.page() as usize)? {
            AtTarget::Content(sent) if sent.hash == *hash => Some(key),
            _ => None,
        }
    }

    fn state(&mut self, key: PageKey) -> &mut AtTarget {
        &mut self.regions[usize::from(key.region())][key.page() as usize]
    }
}

fn place(key: PageKey) -> PageAt {
    PageAt { region: key.region(), page: key.page() }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::hypervisor::Region;

    fn coder() -> PageCoder {
        let region = Region { name: "pc.ram".into(), bytes: 64 * PAGE_BYTES as u64 };
        let layout = MemoryLayout { section_id: 1, regions: vec![region] };
        PageCoder::new(&layout, Arc::new(KnownBlocks::new(0)))
    }

    fn page(number: u64, fill: u8) -> StagedPage {
        (PageKey::new(0, number), Some(Bytes::from(vec![fill; PAGE_BYTES])))
    }

    #[test]
    fn contents_go_once_and_repeats_name_the_page_that_has_them() {
        let mut coder = coder();
        let coded = coder.code(vec![page(1, 7), page(2, 7), page(3, 8)], true);
        assert!(matches!(coded.records[0], PageRecord::Full { .. }));
        let like = PageAt { region: 0, page: 1 };
        assert!(matches!(coded.records[1], PageRecord::Same { like: l, .. } if l == like));
        assert!(matches!(coded.records[2], PageRecord::Full { .. }));
    }

    #[test]
    fn a_page_that_did_not_change_is_not_sent_again() {
        let mut coder = coder();
        coder.code(vec![page(1, 7)], true);
        assert!(coder.code(vec![page(1, 7)], true).records.is_empty());
    }

    #[test]
    fn a_small_change_goes_as_a_difference() {
        let mut coder = coder();
        coder.code(vec![page(1, 7)], true);
        let mut changed = vec![7; PAGE_BYTES];
        changed[100] = 1;
        let coded = coder.code(vec![(PageKey::new(0, 1), Some(Bytes::from(changed)))], true);
        assert!(matches!(coded.records[0], PageRecord::Delta { .. }));
        assert!(coded.content < 300);
    }

    #[test]
    fn a_page_whose_content_moved_on_is_not_named_as_equal() {
        let mut coder = coder();
        coder.code(vec![page(1, 7)], true);
        coder.code(vec![page(1, 9)], true);
        let coded = coder.code(vec![page(2, 7)], true);
        assert!(matches!(coded.records[0], PageRecord::Full { .. }), "{:?}", coded.records);
    }

    #[test]
    fn zeros_are_runs_and_go_once() {
        let mut coder = coder();
        let zeros = || (0..50).map(|number| (PageKey::new(0, number), None)).collect();
        let coded = coder.code(zeros(), true);
        assert_eq!(coded.records.len(), 1);
        assert_eq!(coded.records[0].pages(), 50);
        assert!(coder.code(zeros(), true).records.is_empty());
    }
}
