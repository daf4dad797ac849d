//! One agent per state folder.
//!
//! Invariant: whoever holds an [`InstanceLock`] is the only agent that touches the state folder. The
//! kernel drops the lock with the process, however it ended, so there is no stale lock to clean up.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Proof of being the only agent.
#[derive(Debug)]
pub(crate) struct InstanceLock {
    _file: File,
}

/// Why the lock could not be had.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another agent has it; its process id, if it is known.
    Taken(Option<u32>),
    /// The file could not be opened.
    Io(io::Error),
}

impl InstanceLock {
    pub(crate) fn take(path: &Path) -> Result<Self, LockError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).map_err(LockError::Io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let holder = std::fs::read_to_string(path).ok();
                return Err(LockError::Taken(holder.and_then(|pid| pid.trim().parse().ok())));
            }
            Err(error) => return Err(LockError::Io(error.into())),
        }
        // Only for the error message of the next one.
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(LockError::Io)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_is_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.lock");
        let first = InstanceLock::take(&path).unwrap();
        let second = InstanceLock::take(&path);
        assert!(matches!(second, Err(LockError::Taken(Some(pid))) if pid == std::process::id()));
        drop(first);
        InstanceLock::take(&path).unwrap();
    }
}
