//! Damage at the target: what, where, and when in the course of a push.
//!
//! Invariant: the image is the source's in the end, and so it is after a second push with what the first
//! one left. Damage costs bytes, and nothing else.

use std::path::Path;

use super::index::index_of;
use super::similar::sibling;
use super::*;

/// Two parcels.
const DATA_BYTES: usize = 18 * MIB;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The image that is replaced, before it is compared.
    Image,
    /// Its record.
    Record,
    /// Another image, from which what moved is copied, or patched.
    Sibling,
    /// The record of that.
    SiblingRecord,
    /// A part of the index, which knows that image too.
    Index,
}

#[derive(Debug, Clone, Copy)]
enum Where {
    /// One bit, at so many tenths of the file.
    Bit(usize),
    /// A stretch of noise from its middle on.
    Noise,
    /// All from its middle on is gone.
    Cut,
    /// All of it is gone.
    Gone,
}

/// Does that to a file, whose times stay as they were.
fn harm(path: &Path, place: Where) {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return };
    let (len, modified) = (file.metadata().unwrap().len(), file.metadata().unwrap().modified());
    match place {
        Where::Bit(tenths) if len > 0 => {
            let at = (len * tenths as u64 / 10).min(len - 1);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
        Where::Noise => {
            let bytes = noise(77, (len / 4) as usize);
            file.write_all_at(&bytes, len / 2).unwrap();
        }
        Where::Cut => file.set_len(len / 2).unwrap(),
        Where::Gone => fs::remove_file(path).unwrap(),
        Where::Bit(_) => {}
    }
    let _ = file.set_modified(modified.unwrap());
}

/// The files that are one thing.
fn files(ends: &Ends, what: What) -> Vec<PathBuf> {
    let sibling = ends.dir.path().join("sibling.raw");
    match what {
        What::Image => vec![ends.image()],
        What::Record => vec![RecipeLog::path_for(&ends.image())],
        What::Sibling => vec![sibling],
        What::SiblingRecord => vec![RecipeLog::path_for(&sibling)],
        What::Index => {
            let parts = fs::read_dir(ends.dir.path().join("index")).unwrap();
            parts.map(|part| part.unwrap().path()).filter(|part| part.is_file()).collect()
        }
    }
}

/// Most of it is where it was, some comes from the sibling, moved and changed a little, some is new.
fn images() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let old = noise(1, DATA_BYTES);
    let sibling = noise(2, 6 * MIB);
    let mut new = old.clone();
    new[2 * MIB + 4096..5 * MIB + 4096].copy_from_slice(&sibling[MIB..4 * MIB]);
    for at in (2 * MIB..5 * MIB).step_by(30_000) {
        new[at] ^= 1;
    }
    new[9 * MIB..10 * MIB].copy_from_slice(&noise(3, MIB));
    (old, sibling, new)
}

/// The target with all that may be damaged, its image with a record that it was sent.
async fn furnished(old: &[u8], other: &[u8]) -> (Ends, Known) {
    let (ends, _) = ends().await.send(&Guest::new(old), How::Offer, Vec::new(), false).await;
    let image = sibling(&ends, other);
    let index = index_of(&ends, &image.path);
    let known = Known::of(vec![image], Some(index)).await;
    (ends_in(ends.dir).await, known)
}

async fn survives(what: What, place: Where, items: Option<u64>) {
    let (old, other, new) = images();
    let (mut ends, known) = furnished(&old, &other).await;
    let files = files(&ends, what);
    assert!(!files.is_empty());
    let befall = move || files.iter().for_each(|path| harm(path, place));
    match items {
        None => befall(),
        Some(items) => ends.harm = Some((items, Box::new(befall))),
    }
    let guest = Guest::new(&new);
    let (ends, _) = ends.send(&guest, How::Offer, known, false).await;
    assert!(ends.has() == new, "{what:?} {place:?} after {items:?} items");
    // What is recorded of it is true, or it would be believed the next time.
    let again = ends_in(ends.dir).await;
    let (again, _) = again.send(&guest, How::Offer, Vec::new(), false).await;
    assert!(again.has() == new, "{what:?} {place:?} after {items:?} items, the second time");
}

const PLACES: [Where; 6] =
    [Where::Bit(0), Where::Bit(5), Where::Bit(10), Where::Noise, Where::Cut, Where::Gone];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_damaged_before_it_is_read_no_wrong_byte_is_accepted() {
    for what in [What::Image, What::Record, What::Sibling, What::SiblingRecord, What::Index] {
        for place in PLACES {
            survives(what, place, None).await;
        }
    }
}

/// An image that was compared is as it was then: what rots later is for `verify` to find.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_damaged_while_it_is_read_no_wrong_byte_is_accepted() {
    for what in [What::Record, What::Sibling, What::SiblingRecord, What::Index] {
        for place in PLACES {
            for items in [0, 1, 3] {
                survives(what, place, Some(items)).await;
            }
        }
    }
}
