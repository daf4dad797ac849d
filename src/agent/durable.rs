//! Files that a crash leaves either old or new, never half.
//!
//! Invariant: when [`write`] has returned, the new content survives a power cut.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The content of `path`; nothing if there is no such file.
///
/// # Errors
/// Whatever else the system said.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces `path` with `content`, readable by its owner only.
///
/// # Errors
/// Whatever the system said; `path` is then as it was.
pub(crate) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = name.to_owned();
    temporary.push(".new");
    let temporary = dir.join(temporary);
    // A leftover of a crash is nobody's: only one agent writes in a state folder. It is not written
    // into, as it might be open to others.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    // The rename is durable only once the folder is.
    File::open(dir)?.sync_all()
}

/// Removes `path` for good; one that does not exist is removed already.
///
/// # Errors
/// Whatever the system said.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_last_write_wins_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.toml");
        write(&path, b"old, and longer").unwrap();
        std::fs::write(dir.path().join("peers.toml.new"), "left by a crash").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read(&path).unwrap(), None);
        assert!(!path.exists());
    }
}
