//! What the target finds by its index of images.
//!
//! Invariant: an image that nobody but the index knows is copied from; one that was changed, or is gone, costs
//! what it no longer has, and never a wrong byte.

use longhaul_dedup::places::{Places, Wanted};
use longhaul_dedup::recipe::ImageIdentity;

use super::super::super::known::{Taken, take_record};
use super::*;
use crate::hypervisor::spec::ImageFormat;

/// An index that has read this image.
pub(super) fn index_of(ends: &Ends, path: &PathBuf) -> Arc<Places> {
    let index = Places::open(&ends.dir.path().join("index")).unwrap();
    let data = fs::read(path).unwrap();
    let bytes = data.len() as u64;
    let mut builder = index.builder();
    builder.add_scan(&blocks::scan(&[(0, data.into())])).unwrap();
    let identity = ImageIdentity::of(&fs::metadata(path).unwrap());
    let wanted = Wanted { path: path.clone(), bytes, identity, record: None };
    index.finish(builder, wanted).unwrap();
    Arc::new(index)
}

/// Moved by five blocks, with a new block in each MiB.
fn moved(image: &[u8]) -> Vec<u8> {
    let mut new = [noise(9, 5 * BLOCK_BYTES), image.to_vec()].concat();
    for at in (0..new.len()).step_by(MIB) {
        new[at] ^= 1;
    }
    new
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_never_written_here_is_found_by_the_index() {
    let ends = ends().await;
    let other = noise(1, 8 * MIB);
    let path = ends.dir.path().join("foreign.raw");
    fs::write(&path, &other).unwrap();
    let known = Known::of(Vec::new(), Some(index_of(&ends, &path))).await;
    let new = moved(&other);
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
    assert!(ends.has() == new);
    assert!(round.sent < 60 * BLOCK_BYTES as u64, "{} bytes", round.sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_changed_or_is_gone_since_gives_what_is_left_of_it() {
    for left in [4 * MIB, 0] {
        let ends = ends().await;
        let other = noise(1, 8 * MIB);
        let path = ends.dir.path().join("foreign.raw");
        fs::write(&path, &other).unwrap();
        let index = index_of(&ends, &path);
        if left > 0 {
            fs::write(&path, [&other[..left], &noise(2, 4 * MIB)].concat()).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
        let known = Known::of(Vec::new(), Some(index)).await;
        let new = moved(&other);
        let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
        assert!(ends.has() == new);
        let missing = new.len() - left;
        assert!(round.sent < (missing + 60 * BLOCK_BYTES) as u64, "{} bytes", round.sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_goes_into_the_index_once_and_again_when_it_has_grown() {
    let ends = ends().await;
    let other = noise(1, 2 * MIB);
    let path = ends.dir.path().join("sibling.raw");
    fs::write(&path, &other).unwrap();
    let index = Arc::new(Places::open(&ends.dir.path().join("index")).unwrap());
    assert_eq!(take_record(&index, &path).unwrap(), Taken::Nothing);
    let record = RecipeLog::path_for(&path);
    let mut log = RecipeLog::create(&record, other.len() as u64).unwrap();
    assert_eq!(take_record(&index, &path).unwrap(), Taken::Nothing);
    let scan = |range: std::ops::Range<usize>| {
        blocks::scan(&[(range.start as u64, other[range].to_vec().into())])
    };
    super::super::record::note(&mut log, &scan(0..MIB), &[]).unwrap();
    assert_eq!(take_record(&index, &path).unwrap(), Taken::Added);
    let half = index.snapshot().summary().entries;
    assert_eq!(take_record(&index, &path).unwrap(), Taken::Known);
    super::super::record::note(&mut log, &scan(MIB..2 * MIB), &[]).unwrap();
    // As a receiver does, for each image that has a record.
    let images = vec![ImageFile { path, format: ImageFormat::Raw }];
    let known = Known::of(images, Some(Arc::clone(&index))).await;
    assert_eq!(known.images, []);
    let summary = known.places.summary();
    assert!(summary.entries > half && summary.images == 1 && summary.dropped_entries == 0);
    let new = moved(&other);
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
    assert!(ends.has() == new);
    assert!(round.sent < 20 * BLOCK_BYTES as u64, "{} bytes", round.sent);
}
