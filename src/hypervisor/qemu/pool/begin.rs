//! An image that begins as another: a copy of it, made when it is first to become different.
//!
//! Invariant: the other image is only read, and a copy is durable before anything is written to it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::SeekFrom as SeekTo;
use rustix::io::Errno;
use tokio::sync::{RwLock, RwLockReadGuard};

use super::super::image::{Access, ImageTools, open_image};
use super::io_error;
use crate::hypervisor::{DiskImage, Extent, HypervisorError, ImageFile};

/// Bytes of an image that are copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// An image that is another one until it is first written to.
pub(super) struct BegunLater {
    tools: ImageTools,
    old: ImageFile,
    own: ImageFile,
    bytes: u64,
    state: RwLock<State>,
}

struct State {
    image: Box<dyn DiskImage>,
    is_own: bool,
}

impl BegunLater {
    /// Reads `old` until `own` is begun.
    pub(super) async fn open(
        tools: &ImageTools,
        old: ImageFile,
        own: ImageFile,
    ) -> Result<Self, HypervisorError> {
        let image = open_image(tools, &old, Access::Read).await?;
        let (tools, bytes) = (tools.clone(), image.bytes());
        Ok(Self { tools, old, own, bytes, state: RwLock::new(State { image, is_own: false }) })
    }

    /// The image of its own, begun now if need be.
    async fn own(&self) -> Result<RwLockReadGuard<'_, State>, HypervisorError> {
        let state = self.state.read().await;
        if state.is_own {
            return Ok(state);
        }
        drop(state);
        let mut state = self.state.write().await;
        if !state.is_own {
            begin_from(&self.old.path, &self.own.path).await?;
            let image = open_image(&self.tools, &self.own, Access::Write).await?;
            let old = std::mem::replace(&mut *state, State { image, is_own: true });
            old.image.close().await?;
        }
        Ok(state.downgrade())
    }
}

#[async_trait]
impl DiskImage for BegunLater {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        self.state.read().await.image.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), HypervisorError> {
        self.own().await?.image.write(offset, data).await
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), HypervisorError> {
        self.own().await?.image.zero(offset, len).await
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        self.state.read().await.image.extents().await
    }

    async fn flush(&self) -> Result<(), HypervisorError> {
        let state = self.state.read().await;
        if state.is_own { state.image.flush().await } else { Ok(()) }
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        self.state.into_inner().image.close().await
    }
}

/// Begins an image as a copy of another: sharing its blocks where the file system can, else copying
/// what is no hole.
pub(super) async fn begin_from(old: &Path, part: &Path) -> Result<(), HypervisorError> {
    let (from, to) = (old.to_owned(), part.to_owned());
    let copied = tokio::task::spawn_blocking(move || copy(&from, &to)).await;
    let copied = copied.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()));
    copied.map_err(io_error("beginning with a copy of", old))
}

fn copy(old: &Path, part: &Path) -> io::Result<()> {
    let from = File::open(old)?;
    let to = OpenOptions::new().write(true).create_new(true).open(part)?;
    // Durable, as its record will say of it: what a power loss leaves must not be believed.
    if rustix::fs::ioctl_ficlone(&to, &from).is_ok() {
        return to.sync_all();
    }
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < bytes {
        at = match rustix::fs::seek(&from, SeekTo::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // This file system cannot tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(&from, SeekTo::Hole(at)).unwrap_or(bytes);
        let len = COPY_BYTES.min(usize::try_from(hole.min(bytes) - at).unwrap_or(COPY_BYTES));
        from.read_exact_at(&mut buffer[..len], at)?;
        to.write_all_at(&buffer[..len], at)?;
        at += len as u64;
    }
    to.sync_all()
}
