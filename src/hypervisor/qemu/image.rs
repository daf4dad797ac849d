//! Images on this host that no QEMU runs: the target's disks as they arrive, and those that are read.
//!
//! Invariants: [`create_image`] never touches a file that exists; an image that is written here is
//! written by nobody else meanwhile, as far as locks can tell; it is durable once
//! [`DiskImage::flush`](crate::hypervisor::DiskImage::flush) returned. Under which name an image lies
//! until it is complete is the caller's.

mod locks;
mod qcow2;
mod raw;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use self::qcow2::Qcow2Image;
use self::raw::RawImage;
use crate::hypervisor::spec::ImageFormat;
use crate::hypervisor::{DiskImage, HypervisorError, ImageFile};

/// Disks come in sectors of this size.
const SECTOR_BYTES: u64 = 512;
/// Most bytes of a tool's complaint that are kept.
const COMPLAINT_BYTES_MAX: usize = 4096;

/// What is needed to handle images that only QEMU understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTools {
    /// `qemu-img`, as a path or a name on the `PATH`.
    pub qemu_img: PathBuf,
    /// `qemu-nbd`, likewise.
    pub qemu_nbd: PathBuf,
    /// A private folder for sockets; its path should be short.
    pub run_dir: PathBuf,
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading only; somebody else may have it open too.
    Read,
    /// Reading and writing, alone.
    Write,
}

/// Creates an image of `bytes` zeros (whole sectors of 512 bytes) that takes no space yet.
///
/// # Errors
///
/// If the file exists, whatever is in it; if its folder does not, or the disk is full. A file that
/// could not be made whole is removed again.
pub async fn create_image(
    tools: &ImageTools,
    file: &ImageFile,
    bytes: u64,
) -> Result<(), HypervisorError> {
    check_path(&file.path)?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        let reason = format!("an image cannot have {bytes} bytes: disks have whole sectors");
        return Err(unsupported(&file.path, reason));
    }
    let path = file.path.clone();
    blocking(&file.path, "creating", move || {
        // This reserves the name; whoever comes second fails here.
        OpenOptions::new().write(true).create_new(true).open(path).map(drop)
    })
    .await?;
    let made = match file.format {
        ImageFormat::Raw => {
            let path = file.path.clone();
            blocking(&file.path, "creating", move || {
                let image = OpenOptions::new().write(true).open(path)?;
                image.set_len(bytes)?;
                image.sync_all()
            })
            .await
        }
        ImageFormat::Qcow2 => run_qemu_img_create(tools, &file.path, bytes).await,
    };
    let path = file.path.clone();
    let settled = match made {
        Ok(()) => blocking(&file.path, "making durable", move || {
            File::open(&path)?.sync_all()?;
            File::open(path.parent().unwrap_or_else(|| Path::new("/")))?.sync_all()
        }),
        Err(error) => {
            let _ = tokio::fs::remove_file(&file.path).await;
            return Err(error);
        }
    };
    settled.await
}

async fn run_qemu_img_create(
    tools: &ImageTools,
    path: &Path,
    bytes: u64,
) -> Result<(), HypervisorError> {
    let output = tokio::process::Command::new(&tools.qemu_img)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(bytes.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| HypervisorError::Io {
            doing: format!("running {}", tools.qemu_img.display()),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(complaint(path, "qemu-img create", &output.stderr))
}

/// Opens an image.
///
/// # Errors
///
/// If it does not exist, is not in the format that was named, or is open elsewhere in a way that
/// excludes `access`.
pub async fn open_image(
    tools: &ImageTools,
    file: &ImageFile,
    access: Access,
) -> Result<Box<dyn DiskImage>, HypervisorError> {
    check_path(&file.path)?;
    Ok(match file.format {
        ImageFormat::Raw => Box::new(RawImage::open(file.path.clone(), access).await?),
        ImageFormat::Qcow2 => Box::new(Qcow2Image::open(tools, &file.path, access).await?),
    })
}

/// Whether a QEMU, or a tool of QEMU's, has an image open, as far as this host can tell.
///
/// # Errors
///
/// If the file cannot be opened.
pub(super) fn is_in_use(path: &Path) -> io::Result<bool> {
    locks::held_by_qemu(&File::open(path)?)
}

/// QEMU's tools read `nbd:..` and the like as other things than files; an absolute path is always
/// a file.
fn check_path(path: &Path) -> Result<(), HypervisorError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(unsupported(path, "an image's path must be absolute".to_owned()))
}

fn unsupported(path: &Path, reason: String) -> HypervisorError {
    HypervisorError::Unsupported { vm: path.display().to_string(), reason }
}

fn io_error(path: &Path, doing: &str, source: io::Error) -> HypervisorError {
    HypervisorError::Io { doing: format!("{doing} image {}", path.display()), source }
}

fn in_use(path: &Path, by: &str) -> HypervisorError {
    unsupported(path, format!("the image is in use by {by}: let it end first"))
}

/// What a tool of QEMU's said on its way out.
fn complaint(path: &Path, tool: &str, stderr: &[u8]) -> HypervisorError {
    let kept = &stderr[..stderr.len().min(COMPLAINT_BYTES_MAX)];
    let text = String::from_utf8_lossy(kept).trim().replace('\n', "; ");
    if text.contains("lock") && text.contains("Failed to get") {
        return in_use(path, "another process (a running VM, or a tool of QEMU's)");
    }
    HypervisorError::Refused {
        vm: path.display().to_string(),
        command: tool.to_owned(),
        detail: if text.is_empty() { "it gave no reason".to_owned() } else { text },
    }
}

/// Runs file operations off the async threads.
async fn blocking<T: Send + 'static>(
    path: &Path,
    doing: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, HypervisorError> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()));
    done.map_err(|source| io_error(path, doing, source))
}
