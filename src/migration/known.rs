//! The images beside those that arrive, as a receiver finds its way into them: by the index of this host, and
//! by their records where there is no index.
//!
//! Invariant: an image's record goes into the index when it is another than the one that the index has; the
//! image itself is not read.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use longhaul_dedup::places::{Places, PlacesError, Snapshot, Wanted};
use longhaul_dedup::recipe::{Claims, ImageIdentity, RecipeLog};

use crate::hypervisor::ImageFile;
use crate::hypervisor::spec::ImageFormat;

/// What may be copied from.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The index.
    pub(super) places: Snapshot,
    /// Images that the index does not tell of, each with a record.
    pub(super) images: Vec<ImageFile>,
}

impl From<Vec<ImageFile>> for Known {
    /// Without an index.
    fn from(images: Vec<ImageFile>) -> Self {
        Self { images, ..Self::default() }
    }
}

/// What became of a record that was offered to the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is in the index now.
    Added,
    /// What the index has of the image is from it, or from reading the image as it is.
    Known,
    /// It claims nothing, or cannot be read.
    Nothing,
}

impl Known {
    /// Of images that have records, with an index or without one.
    pub(super) async fn of(images: Vec<ImageFile>, index: Option<Arc<Places>>) -> Self {
        let Some(index) = index else { return images.into() };
        let taking = tokio::task::spawn_blocking(move || {
            // Only raw images are copied from in place.
            let raw = images.into_iter().filter(|image| image.format == ImageFormat::Raw);
            let images = raw.filter(|image| match take_record(&index, &image.path) {
                Ok(Taken::Added | Taken::Known) => false,
                Ok(Taken::Nothing) => true,
                Err(error) => {
                    // Its record is read all the same, each time.
                    tracing::warn!(image = %image.path.display(), %error, "not in the index");
                    true
                }
            });
            let images = images.collect();
            Self { places: index.snapshot(), images }
        });
        taking.await.expect("taking records does not panic")
    }
}

/// Takes what the record beside an image says into the index, unless it has that already.
///
/// # Errors
/// The index cannot be written; it is as it was.
pub fn take_record(index: &Places, image: &Path) -> Result<Taken, PlacesError> {
    let path = RecipeLog::path_for(image);
    let identities = (fs::metadata(image), fs::metadata(&path));
    let (Ok(file), Ok(record)) = identities else { return Ok(Taken::Nothing) };
    let (identity, record) = (ImageIdentity::of(&file), ImageIdentity::of(&record));
    let snapshot = index.snapshot();
    let is_known = snapshot.images().any(|(known, _)| {
        let read_since = known.record.is_none() && known.identity == identity;
        known.path == image && known.whole && (known.record == Some(record) || read_since)
    });
    if is_known {
        return Ok(Taken::Known);
    }
    let claims = File::open(&path).ok();
    let claims = claims.and_then(|file| Claims::read(BufReader::with_capacity(1 << 20, file)).ok());
    let Some(claims) = claims else { return Ok(Taken::Nothing) };
    let bytes = claims.image_bytes();
    let mut builder = index.builder();
    // A record that cannot be read further has told what it could.
    for claim in claims.map_while(Result::ok) {
        builder.add_claim(&claim)?;
    }
    if builder.is_empty() {
        return Ok(Taken::Nothing);
    }
    let wanted = Wanted { path: image.to_owned(), bytes, identity, record: Some(record) };
    index.finish(builder, wanted)?;
    Ok(Taken::Added)
}
