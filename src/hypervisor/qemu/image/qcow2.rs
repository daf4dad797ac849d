//! A qcow2 image through a `qemu-nbd` child: the format stays QEMU's business, with its locks.
//!
//! Invariant: the child serves one connection, ours, and ends with it. So it does not outlive us,
//! however we end, and the image is given up as soon as the connection is; a child that stays all
//! the same is killed, and it is always waited for.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{Access, COMPLAINT_BYTES_MAX, ImageTools, complaint, unsupported};
use crate::hypervisor::qemu::disk::{NAMES_PREFIX, SOCKET_PATH_BYTES_MAX};
use crate::hypervisor::qemu::extents::Extents;
use crate::hypervisor::qemu::nbd::codec::ALLOCATION_ZERO;
use crate::hypervisor::qemu::nbd::{NbdAddress, NbdClient, NbdError};
use crate::hypervisor::{DiskImage, Extent, HypervisorError};

/// Longest wait until the child listens: it only opens the image.
const START_WAIT_MAX: Duration = Duration::from_secs(20);
/// How often it is looked for its socket.
const START_POLL: Duration = Duration::from_millis(5);
/// Longest wait for the child to write its caches and end.
const END_WAIT_MAX: Duration = Duration::from_secs(60);
/// What the child calls the image on the wire.
const EXPORT: &str = "image";

/// Tells sockets of one process apart.
static SOCKETS: AtomicU64 = AtomicU64::new(0);

/// See [`DiskImage`].
#[derive(Debug)]
pub(super) struct Qcow2Image {
    path: PathBuf,
    client: NbdClient,
    /// Dropping it tells the task that the connection ends.
    leaving: oneshot::Sender<()>,
    child: JoinHandle<Result<(), String>>,
    writable: bool,
}

impl Qcow2Image {
    pub(super) async fn open(
        tools: &ImageTools,
        path: &Path,
        access: Access,
    ) -> Result<Self, HypervisorError> {
        let number = SOCKETS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{NAMES_PREFIX}image-{}-{number}.sock", std::process::id());
        let socket = tools.run_dir.join(name);
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let reason = format!("the socket path {} is too long", socket.display());
            return Err(unsupported(path, reason));
        }
        let mut command = Command::new(&tools.qemu_nbd);
        command
            .arg("--socket")
            .arg(&socket)
            .args(["--format=qcow2", "--export-name", EXPORT, "--cache=writeback"])
            .args(["--discard=unmap", "--detect-zeroes=unmap"])
            .args((access == Access::Read).then_some("--read-only"))
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|source| HypervisorError::Io {
            doing: format!("running {}", tools.qemu_nbd.display()),
            source,
        })?;
        let connected = connect(&mut child, path, &socket).await;
        // A connection outlives the name of its socket, and nobody else is to come.
        let _ = std::fs::remove_file(&socket);
        let client = match connected {
            Ok(client) => client,
            Err(error) => {
                // It may have ended already.
                let _ = child.start_kill();
                let _ = child.wait().await;
                return Err(error);
            }
        };
        let (leaving, left) = oneshot::channel();
        let child = tokio::spawn(look_after(child, left));
        let writable = access == Access::Write;
        Ok(Self { path: path.to_owned(), client, leaving, child, writable })
    }

    fn failed(&self, doing: &str, error: NbdError) -> HypervisorError {
        HypervisorError::Io {
            doing: format!("{doing} image {}", self.path.display()),
            source: std::io::Error::other(error),
        }
    }
}

async fn connect(
    child: &mut Child,
    path: &Path,
    socket: &Path,
) -> Result<NbdClient, HypervisorError> {
    let started = Instant::now();
    let address = NbdAddress::Unix(socket.to_owned());
    loop {
        let error = match NbdClient::connect(&address, EXPORT, &["base:allocation"]).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        let early = matches!(&error, NbdError::Connect { source, .. } if matches!(
            source.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
        ));
        let ended = child.try_wait().ok().flatten().is_some();
        if !ended && early && started.elapsed() < START_WAIT_MAX {
            sleep(START_POLL).await;
            continue;
        }
        // It listens before it opens the image: why that failed it says on its way out.
        if timeout(END_WAIT_MAX, child.wait()).await.is_ok()
            && let Some(stderr) = child.stderr.take()
        {
            return Err(complaint(path, "qemu-nbd", &said(stderr).await));
        }
        return Err(HypervisorError::Io {
            doing: format!("opening image {} through qemu-nbd", path.display()),
            source: std::io::Error::other(error),
        });
    }
}

/// The first bytes that somebody says until the end; the rest is read and forgotten.
async fn said(mut from: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        let room = COMPLAINT_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..len.min(room)]);
    }
    kept
}

/// Waits for the child and what it says; kills it if it stays after its connection ended.
async fn look_after(mut child: Child, left: oneshot::Receiver<()>) -> Result<(), String> {
    let stderr = child.stderr.take();
    let speaking = tokio::spawn(async move {
        match stderr {
            Some(stderr) => said(stderr).await,
            None => Vec::new(),
        }
    });
    let status = tokio::select! {
        status = child.wait() => status,
        _ = left => match timeout(END_WAIT_MAX, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                // It may have ended just now.
                let _ = child.kill().await;
                return Err(format!("qemu-nbd did not end in {} s", END_WAIT_MAX.as_secs()));
            }
        },
    };
    let said = speaking.await.unwrap_or_default();
    let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("qemu-nbd ended with {status}: {said}")),
        Err(error) => Err(format!("qemu-nbd cannot be waited for: {error}")),
    }
}

#[async_trait]
impl DiskImage for Qcow2Image {
    fn bytes(&self) -> u64 {
        self.client.info().bytes
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        self.client.read(offset, len).await.map_err(|e| self.failed("reading", e))
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), HypervisorError> {
        if data.is_empty() {
            return Ok(());
        }
        self.client.write(offset, data).await.map_err(|e| self.failed("writing", e))
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), HypervisorError> {
        if len == 0 {
            return Ok(());
        }
        let zeroed = self.client.write_zeroes(offset, len, false).await;
        zeroed.map_err(|e| self.failed("zeroing", e))
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        let mut extents = Extents::new();
        let each = |s: crate::hypervisor::qemu::nbd::Status| {
            extents.push(s.offset, s.len, s.flags & ALLOCATION_ZERO != 0);
        };
        let asked = self.client.status(0, 0, self.bytes(), each).await;
        asked.map_err(|e| self.failed("finding holes of", e))?;
        Ok(extents.finish())
    }

    async fn flush(&self) -> Result<(), HypervisorError> {
        if !self.writable {
            return Ok(());
        }
        self.client.flush().await.map_err(|e| self.failed("flushing", e))
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        self.flush().await?;
        let Self { path, client, leaving, child, .. } = *self;
        client.disconnect().await;
        drop(leaving);
        // Only when it ended is the image free for others.
        let ended = child.await.unwrap_or_else(|_| Err("it was not waited for".to_owned()));
        ended.map_err(|detail| HypervisorError::Refused {
            vm: path.display().to_string(),
            command: "closing the image".to_owned(),
            detail,
        })
    }
}
