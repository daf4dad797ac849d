//! What lies in the pools and is of no use any more: found, and removed if that is wished.
//!
//! Invariant: an image that has its name is never touched, nor what belongs to it, nor a disk that waits for
//! its VM; and nothing is removed that was written to within [`AGE_MIN`], longer than any job waits for
//! its link.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use longhaul_dedup::recipe::RecipeLog;

use crate::control::{Failure, Garbage, GarbageKind, GcRequest, GcSummary};
use crate::hypervisor::qemu::host::{PART_SUFFIX, RECIPE_SUFFIX};

/// What was written to within this time may be of a job that waits.
const AGE_MIN: Duration = Duration::from_secs(25 * 3600);

/// Looks through these pools, and removes what it finds if it is to.
///
/// # Errors
/// The age is less than [`AGE_MIN`], or a pool cannot be read.
pub(super) fn sweep(
    pools: &BTreeMap<String, PathBuf>,
    wish: GcRequest,
    now: SystemTime,
) -> Result<GcSummary, Failure> {
    if wish.older_s < AGE_MIN.as_secs() {
        let what =
            "what was written to within the last 25 hours may be of a job that waits".to_owned();
        return Err(Failure::refused(what, "ask for what is older, e.g. --older 2d"));
    }
    let mut garbage = Vec::new();
    for dir in pools.values() {
        let unreadable = |error: std::io::Error| {
            let what = format!("the pool's folder {} cannot be read: {error}", dir.display());
            Failure::failed(what, "nothing was removed", "mend it, or take the pool out")
        };
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(dir).map_err(unreadable)? {
            names.push(entry.map_err(unreadable)?.path());
        }
        names.sort();
        garbage.extend(names.iter().filter_map(|path| look(path, now)));
    }
    garbage.retain(|one| one.age_s >= wish.older_s);
    if wish.go {
        garbage.iter_mut().for_each(remove);
    }
    let gone = garbage.iter().filter(|one| one.stays.is_none());
    let bytes = gone.map(|one| one.bytes).sum();
    Ok(GcSummary { garbage, bytes, removed: wish.go })
}

/// What this file is, if it is of no use.
fn look(path: &Path, now: SystemTime) -> Option<Garbage> {
    let name = path.to_str()?;
    let (kind, files) = if name.ends_with(PART_SUFFIX) {
        (GarbageKind::Unfinished, vec![path.to_owned(), RecipeLog::path_for(path)])
    } else {
        let image = Path::new(name.strip_suffix(RECIPE_SUFFIX)?);
        // Whatever stands there, also what cannot be looked at, keeps its record.
        let is_gone = fs::symlink_metadata(image)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        is_gone.then(|| (GarbageKind::Orphan, vec![path.to_owned()]))?
    };
    let found: Vec<fs::Metadata> =
        files.iter().filter_map(|file| fs::symlink_metadata(file).ok()).collect();
    if !found.first()?.is_file() {
        return None;
    }
    let written = found.iter().filter_map(|file| file.modified().ok()).max()?;
    Some(Garbage {
        path: name.to_owned(),
        kind,
        bytes: found.iter().map(|file| file.blocks() * 512).sum(),
        // What is from the future is as young as can be.
        age_s: now.duration_since(written).unwrap_or_default().as_secs(),
        stays: None,
    })
}

fn remove(one: &mut Garbage) {
    let path = Path::new(&one.path);
    let removed = fs::remove_file(path).and_then(|()| match one.kind {
        GarbageKind::Unfinished => match fs::remove_file(RecipeLog::path_for(path)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
        GarbageKind::Orphan => Ok(()),
    });
    match removed {
        Ok(()) => tracing::info!(path = one.path, bytes = one.bytes, "removed from its pool"),
        Err(error) => one.stays = Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_old_and_of_no_use_goes() {
        let dir = tempfile::tempdir().unwrap();
        let pools = BTreeMap::from([("default".to_owned(), dir.path().to_owned())]);
        let write = |name: &str| fs::write(dir.path().join(name), vec![1; 8192]).unwrap();
        let all = [
            "a.raw",
            "a.raw.longhaul-recipe",
            "b.raw.longhaul-part",
            "b.raw.longhaul-part.longhaul-recipe",
            "c.raw.longhaul-recipe",
            "d.raw",
            "d.raw.longhaul-incoming",
            "d.raw.longhaul-recipe",
            "notes.txt",
        ];
        all.iter().for_each(|name| write(name));
        let two_days = GcRequest { older_s: 2 * 86_400, go: false };
        let now = SystemTime::now();
        assert!(sweep(&pools, two_days, now).unwrap().garbage.is_empty(), "all of it is new");
        let later = now + Duration::from_secs(3 * 86_400);
        let found = sweep(&pools, two_days, later).unwrap();
        let names = |found: &GcSummary| -> Vec<(String, GarbageKind)> {
            let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
            found.garbage.iter().map(|one| (name(&one.path), one.kind)).collect()
        };
        let useless = [
            ("b.raw.longhaul-part".to_owned(), GarbageKind::Unfinished),
            ("c.raw.longhaul-recipe".to_owned(), GarbageKind::Orphan),
        ];
        assert_eq!(names(&found), useless);
        assert_eq!((found.bytes, found.removed), (3 * 8192, false));
        assert!(all.iter().all(|name| dir.path().join(name).exists()), "it was only shown");

        let done = sweep(&pools, GcRequest { go: true, ..two_days }, later).unwrap();
        assert_eq!(names(&done), useless);
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, [all[0], all[1], all[5], all[6], all[7], all[8]]);
        assert!(
            sweep(&pools, GcRequest { go: true, ..two_days }, later).unwrap().garbage.is_empty()
        );

        let hasty = sweep(&pools, GcRequest { older_s: 3600, go: true }, later).unwrap_err();
        assert!(hasty.next.contains("--older"), "{hasty:?}");
    }
}
