//! Whether a QEMU has an image open, by the kernel's table of locks.
//!
//! QEMU marks the images that it uses with locks on single bytes from 100 and from 200 on
//! (`block/file-posix.c`, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`). Invariant: reads the
//! table only; what is not in it (another host's locks, file systems that number their files anew)
//! cannot be seen.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

/// Bytes that QEMU may lock.
const QEMU_LOCK_BYTES: std::ops::RangeInclusive<u64> = 100..=299;

/// Whether a QEMU, or a tool of QEMU's, holds `file` open.
pub(super) fn held_by_qemu(file: &File) -> io::Result<bool> {
    let table = std::fs::read_to_string("/proc/locks")?;
    Ok(table.lines().any(|line| is_qemu_lock(line, &file.metadata().ok())))
}

/// `1: OFDLCK ADVISORY READ -1 08:02:1234 100 101`
fn is_qemu_lock(line: &str, file: &Option<Metadata>) -> bool {
    let Some(file) = file else { return false };
    let device = rustix::fs::major(file.dev()) as u64;
    let minor = rustix::fs::minor(file.dev()) as u64;
    is_lock_of(line, (device, minor, file.ino()))
}

fn is_lock_of(line: &str, (major, minor, inode): (u64, u64, u64)) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(5);
    let Some(place) = fields.next() else { return false };
    let mut numbers = place.splitn(3, ':');
    let mut hex = || numbers.next().and_then(|n| u64::from_str_radix(n, 16).ok());
    if (hex(), hex()) != (Some(major), Some(minor)) {
        return false;
    }
    let same_file = numbers.next().and_then(|n| n.parse().ok()) == Some(inode);
    let start = fields.next().and_then(|n| n.parse().ok());
    same_file && start.is_some_and(|start| QEMU_LOCK_BYTES.contains(&start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qemus_bytes_of_the_same_file_count() {
        let file = (8, 0x1a, 1234);
        assert!(is_lock_of("1: OFDLCK ADVISORY  READ -1 08:1a:1234 100 101", file));
        assert!(is_lock_of("17: OFDLCK ADVISORY  READ -1 08:1a:1234 201 201", file));
        assert!(!is_lock_of("1: OFDLCK ADVISORY  READ -1 08:1a:1235 100 101", file));
        assert!(!is_lock_of("1: OFDLCK ADVISORY  READ -1 08:1b:1234 100 101", file));
        assert!(!is_lock_of("1: FLOCK  ADVISORY  WRITE 77 08:1a:1234 0 EOF", file));
        assert!(!is_lock_of("1: -> FLOCK", file));
        assert!(!is_lock_of("", file));
    }
}
