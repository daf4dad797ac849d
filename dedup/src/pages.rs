//! Pages of guest memory and their hashes.
//!
//! A lone 4 KiB page keeps only a quarter of a wide BLAKE3 unit busy: it has four 1 KiB leaves.
//! [`hash_pages`] hashes the same leaf of many pages side by side instead.
//!
//! Invariant: a [`PageHash`] is `blake3::hash` of the page, however it was computed, and therefore
//! also the [`ChunkId`] of a disk block with the same bytes.

use std::{array, fmt};

use blake3::{IncrementCounter, platform::Platform};
use bytes::Bytes;

use crate::id::ChunkId;

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;

/// A page of zeros.
pub const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// The content of one page: exactly [`PAGE_BYTES`] bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Page(Bytes);

/// Bytes that are not one page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are not a page of 4096 bytes")]
pub struct NotAPage {
    /// How many bytes there were.
    pub bytes: usize,
}

impl Page {
    /// A page of zeros.
    pub fn zero() -> Self {
        Self(Bytes::from_static(&ZERO_PAGE))
    }

    /// Its bytes.
    pub fn as_array(&self) -> &[u8; PAGE_BYTES] {
        self.0.first_chunk().expect("the length was checked when the page was made")
    }

    /// Its bytes, given up.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }
}

impl TryFrom<Bytes> for Page {
    type Error = NotAPage;

    fn try_from(bytes: Bytes) -> Result<Self, NotAPage> {
        if bytes.len() == PAGE_BYTES {
            Ok(Self(bytes))
        } else {
            Err(NotAPage { bytes: bytes.len() })
        }
    }
}

impl From<&[u8; PAGE_BYTES]> for Page {
    fn from(bytes: &[u8; PAGE_BYTES]) -> Self {
        Self(Bytes::copy_from_slice(bytes))
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({})", ChunkId::of(&self.0).short())
    }
}

/// The BLAKE3-256 hash of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash([u8; blake3::OUT_LEN]);

impl PageHash {
    /// The hash of one page. Many pages are hashed faster by [`hash_pages`].
    pub fn of(page: &[u8; PAGE_BYTES]) -> Self {
        Self(*blake3::hash(page).as_bytes())
    }

    /// The hash of what is shorter than a page: the end of a disk.
    pub(crate) fn of_short(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; blake3::OUT_LEN] {
        &self.0
    }

    /// The id of a disk block with these bytes.
    pub const fn chunk_id(&self) -> ChunkId {
        ChunkId::from_bytes(self.0)
    }
}

/// Pages that are hashed side by side: the widest unit that BLAKE3 has code for (AVX-512). Narrower
/// units take a group in several steps.
const GROUP: usize = 16;
/// Fewer pages side by side gain nothing over the four leaves of a single page: with a 16-wide unit
/// 6 pages were hashed at 2.5 GB/s, 8 at 5.0, 16 at 7.3, and one by one at 3.0.
const GROUP_WORTHWHILE: usize = 8;

/// The hash of each page, in order.
pub fn hash_pages(pages: &[&[u8; PAGE_BYTES]]) -> Vec<PageHash> {
    let mut hashes = Vec::with_capacity(pages.len());
    let platform = Platform::detect();
    for group in pages.chunks(GROUP) {
        if group.len() < GROUP_WORTHWHILE {
            hashes.extend(group.iter().map(|page| PageHash::of(page)));
        } else {
            hash_group(platform, group, &mut hashes);
        }
    }
    hashes
}

// BLAKE3's tree, from its specification (https://github.com/BLAKE3-team/BLAKE3-specs), sections
// 2.1, 2.4 and 2.5: a page is four leaves of 1 KiB, two parents, one root.
const LEAF_BYTES: usize = 1024;
const LEAVES: usize = PAGE_BYTES / LEAF_BYTES;
const CV_BYTES: usize = 32;
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;

fn hash_group(platform: Platform, group: &[&[u8; PAGE_BYTES]], hashes: &mut Vec<PageHash>) {
    let pages = group.len();
    let mut leaves = [[0; GROUP * CV_BYTES]; LEAVES];
    for (leaf, out) in leaves.iter_mut().enumerate() {
        // Lanes beyond the group repeat its last page and are cut off below.
        let inputs: [&[u8; LEAF_BYTES]; GROUP] = array::from_fn(|lane| {
            group[lane.min(pages - 1)][leaf * LEAF_BYTES..]
                .first_chunk()
                .expect("a page has room for each of its leaves")
        });
        platform.hash_many(
            &inputs[..pages],
            &IV,
            leaf as u64,
            IncrementCounter::No,
            0,
            CHUNK_START,
            CHUNK_END,
            &mut out[..pages * CV_BYTES],
        );
    }
    let [first, second, third, fourth] = &leaves;
    let mut left = [0; GROUP * CV_BYTES];
    let mut right = [0; GROUP * CV_BYTES];
    let mut root = [0; GROUP * CV_BYTES];
    hash_parents(platform, pages, first, second, PARENT, &mut left);
    hash_parents(platform, pages, third, fourth, PARENT, &mut right);
    hash_parents(platform, pages, &left, &right, PARENT | ROOT, &mut root);
    hashes.extend(root.as_chunks().0[..pages].iter().map(|hash| PageHash(*hash)));
}

/// One parent for each of the first `pages` pairs of `left` and `right`.
fn hash_parents(
    platform: Platform,
    pages: usize,
    left: &[u8; GROUP * CV_BYTES],
    right: &[u8; GROUP * CV_BYTES],
    flags: u8,
    out: &mut [u8; GROUP * CV_BYTES],
) {
    let mut blocks = [[0; 2 * CV_BYTES]; GROUP];
    for (lane, block) in blocks.iter_mut().enumerate() {
        let cv = lane * CV_BYTES..(lane + 1) * CV_BYTES;
        block[..CV_BYTES].copy_from_slice(&left[cv.clone()]);
        block[CV_BYTES..].copy_from_slice(&right[cv]);
    }
    let inputs: [&[u8; 2 * CV_BYTES]; GROUP] = array::from_fn(|lane| &blocks[lane]);
    platform.hash_many(
        &inputs[..pages],
        &IV,
        0,
        IncrementCounter::No,
        flags,
        0,
        0,
        &mut out[..pages * CV_BYTES],
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_a_whole_page_is_a_page() {
        assert!(Page::try_from(Bytes::from(vec![1; PAGE_BYTES])).is_ok());
        for bytes in [0, PAGE_BYTES - 1, PAGE_BYTES + 1] {
            assert_eq!(Page::try_from(Bytes::from(vec![1; bytes])), Err(NotAPage { bytes }));
        }
    }

    #[test]
    fn a_page_and_a_disk_block_share_their_name() {
        assert_eq!(PageHash::of(&ZERO_PAGE).chunk_id(), ChunkId::of(&[0; 4096]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn side_by_side_is_one_by_one(seed: u64, count in 0_usize..60) {
            let mut bytes = vec![0; count * PAGE_BYTES];
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
            let pages: Vec<&[u8; PAGE_BYTES]> = bytes.as_chunks().0.iter().collect();
            let expected: Vec<PageHash> = pages.iter().map(|page| PageHash::of(page)).collect();
            prop_assert_eq!(hash_pages(&pages), expected);
        }
    }
}
