//! Images compared with their records, piece by piece.
//!
//! Invariant: an image is only read. A record that vouches for what is not there any more is taken away, lest
//! anybody believes it.

use std::path::Path;

use longhaul_dedup::chunk;
use longhaul_dedup::recipe::{ImageIdentity, RecipeLog};

use crate::control::{Failure, IndexProgress, VerifySummary, chain};
use crate::hypervisor::Host;

/// Stretches that are named; all are counted.
const NAMED_MAX: usize = 20;
const NEXT: &str = "nothing was changed";

/// Reads all of an image that its record knows. `tell` hears how far it is.
///
/// # Errors
/// There is no such image, it is in use, or nothing is recorded of it.
pub(super) async fn verify(
    host: &dyn Host,
    image: &Path,
    mut tell: impl FnMut(IndexProgress),
) -> Result<VerifySummary, Failure> {
    let name = image.display().to_string();
    let failed = |what: String, next: &str| Failure::refused(format!("{name}: {what}"), next);
    let path = RecipeLog::path_for(image);
    if image.exists() && !path.exists() {
        return Err(failed(
            "nothing is recorded of it".to_owned(),
            "images that Longhaul wrote, sent or received have a record beside them",
        ));
    }
    let view = host.image(image).await.map_err(|error| failed(chain(&error), NEXT))?;
    let identity = || match std::fs::metadata(image) {
        Ok(file) => Ok(ImageIdentity::of(&file)),
        Err(error) => Err(failed(error.to_string(), NEXT)),
    };
    let before = identity()?;
    let recipe = RecipeLog::load(&path).map_err(|error| failed(chain(&error), NEXT))?;
    let mut summary = VerifySummary {
        image: name.clone(),
        bytes: view.info().bytes,
        recorded_bytes: 0,
        untouched: recipe.complete().is_some_and(|kept| kept.image == before),
        differing_bytes: 0,
        differing: Vec::new(),
    };
    for entry in recipe.entries() {
        let (offset, len) = (entry.offset, u64::from(entry.len));
        summary.recorded_bytes += len;
        // A record may be of an image that was longer once.
        let inside = offset + len <= summary.bytes;
        let data = if inside { view.read(offset, entry.len).await.ok() } else { None };
        if data.is_none_or(|data| chunk::verify(entry.id, data).is_err()) {
            summary.differing_bytes += len;
            let named = summary.differing.len();
            match summary.differing.last_mut() {
                Some((first, before)) if *first + *before == offset => *before += len,
                _ if named < NAMED_MAX => summary.differing.push((offset, len)),
                _ => {}
            }
        }
        tell(IndexProgress { image: name.clone(), read: offset + len, total: summary.bytes });
    }
    // What was written while it was read is no damage.
    summary.untouched &= identity()? == before;
    if summary.untouched && summary.differing_bytes > 0 {
        let removed = std::fs::remove_file(&path);
        removed
            .map_err(|error| failed(format!("its record is wrong, and stays: {error}"), NEXT))?;
        tracing::warn!(image = name, bytes = summary.differing_bytes, "an image is damaged");
    }
    // It was only read: how that ends says nothing about it.
    let _ = view.close().await;
    Ok(summary)
}
