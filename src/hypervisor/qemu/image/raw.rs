//! A raw image, or a block device: the guest's bytes at their own places.
//!
//! Invariant: the file keeps its size; nothing is read or written outside of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom as SeekTo};
use rustix::io::Errno;
use tokio::sync::Semaphore;

use super::{Access, blocking, in_use, io_error, locks, unsupported};
use crate::hypervisor::qemu::extents::Extents;
use crate::hypervisor::qemu::nbd::READ_BYTES_MAX;
use crate::hypervisor::{DiskImage, Extent, HypervisorError};

/// Reads and writes under way at once: each holds a thread while it waits for the disk.
const OPERATIONS_MAX: usize = 16;
/// Zeros written at a time where no hole can be made.
const ZEROS_BYTES: usize = 1 << 20;

/// See [`DiskImage`].
#[derive(Debug)]
pub(super) struct RawImage {
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    turns: Semaphore,
}

impl RawImage {
    pub(super) async fn open(path: PathBuf, access: Access) -> Result<Self, HypervisorError> {
        let opened = {
            let path = path.clone();
            blocking(&path.clone(), "opening", move || open_file(&path, access)).await?
        };
        match opened {
            Opened::Free { file, bytes } => {
                let turns = Semaphore::new(OPERATIONS_MAX);
                Ok(Self { path, file: Arc::new(file), bytes, turns })
            }
            Opened::InUse(by) => Err(in_use(&path, by)),
        }
    }

    fn check(
        &self,
        doing: &str,
        offset: u64,
        len: u64,
        len_max: u64,
    ) -> Result<(), HypervisorError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes && len <= len_max => Ok(()),
            _ => Err(unsupported(
                &self.path,
                format!(
                    "{doing} {len} bytes at {offset} is too much, or outside of its {} bytes",
                    self.bytes
                ),
            )),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        doing: &str,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let _turn = self.turns.acquire().await.expect("the semaphore is never closed");
        let file = Arc::clone(&self.file);
        blocking(&self.path, doing, move || work(&file)).await
    }
}

enum Opened {
    Free { file: File, bytes: u64 },
    InUse(&'static str),
}

fn open_file(path: &std::path::Path, access: Access) -> io::Result<Opened> {
    let write = access == Access::Write;
    let mut file = OpenOptions::new().read(true).write(write).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if write {
        // For others like us: a QEMU neither takes nor sees this kind of lock.
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Opened::InUse("another process")),
            Err(error) => return Err(error.into()),
        }
        if locks::held_by_qemu(&file)? {
            return Ok(Opened::InUse("a running VM or a tool of QEMU's"));
        }
    }
    // Tells the size of block devices too, which have none in their metadata.
    let bytes = file.seek(SeekFrom::End(0))?;
    Ok(Opened::Free { file, bytes })
}

#[async_trait]
impl DiskImage for RawImage {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        self.check("reading", offset, u64::from(len), u64::from(READ_BYTES_MAX))?;
        let len = len as usize;
        self.run("reading", move |file| {
            let mut buffer = vec![0; len];
            file.read_exact_at(&mut buffer, offset)?;
            Ok(Bytes::from(buffer))
        })
        .await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), HypervisorError> {
        self.check("writing", offset, data.len() as u64, u64::from(READ_BYTES_MAX))?;
        self.run("writing", move |file| file.write_all_at(&data, offset)).await
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), HypervisorError> {
        self.check("zeroing", offset, len, u64::MAX)?;
        if len == 0 {
            return Ok(());
        }
        self.run("zeroing", move |file| zero(file, offset, len)).await
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        let bytes = self.bytes;
        self.run("finding holes of", move |file| extents(file, bytes)).await
    }

    async fn flush(&self) -> Result<(), HypervisorError> {
        self.run("flushing", |file| file.sync_all()).await
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        self.flush().await?;
        let path = self.path.clone();
        // Closing may write too, on some file systems.
        let closed = tokio::task::spawn_blocking(move || drop(self)).await;
        closed.map_err(|_| io_error(&path, "closing", io::ErrorKind::Interrupted.into()))
    }
}

fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, punch, offset, len) {
        Ok(()) => Ok(()),
        // This file system or device has no holes.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            let zeros = vec![0; ZEROS_BYTES];
            let mut at = offset;
            while at < offset + len {
                let step = (offset + len - at).min(ZEROS_BYTES as u64);
                let step_len = usize::try_from(step).expect("at most ZEROS_BYTES");
                file.write_all_at(&zeros[..step_len], at)?;
                at += step;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn extents(file: &File, bytes: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Extents::new();
    let mut at = 0;
    while at < bytes {
        let data = match rustix::fs::seek(file, SeekTo::Data(at)) {
            Ok(data) => data.min(bytes),
            // A hole up to the end.
            Err(Errno::NXIO) => bytes,
            // Block devices and some file systems cannot tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        extents.push(at, data - at, true);
        if data >= bytes {
            break;
        }
        let hole = match rustix::fs::seek(file, SeekTo::Hole(data)) {
            Ok(hole) => hole.min(bytes),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => bytes,
            Err(error) => return Err(error.into()),
        };
        // A file that changes meanwhile must not keep us here.
        let hole = hole.max(data + 1);
        extents.push(data, hole - data, false);
        at = hole;
    }
    Ok(extents.finish())
}
