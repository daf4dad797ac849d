//! Images that travel without a VM: one that is read, and one that is built in a pool of this host's.
//!
//! Invariant: what arrives is built beside its name and takes the name in one step, once its caller
//! says that it is complete: whoever reads the name sees the image that was there, or none, or the new
//! one whole. An image that is there stays unless the caller was told to replace it, and in any case
//! as long as a QEMU has it open.
//!
//! ```text
//!  FILE                               the image, complete
//!  FILE.longhaul-part                 the one that arrives; it stays for the next try
//!  FILE.longhaul-part.longhaul-recipe what is known of it; `dedup` keeps it
//! ```

mod begin;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;

use self::begin::{BegunLater, begin_from};
use super::host::{RECIPE_SUFFIX, beside};
use super::image::{Access, ImageTools, create_image, is_in_use, open_image};
use crate::hypervisor::spec::ImageFormat;
use crate::hypervisor::spec::ImageLocation;
use crate::hypervisor::spec::host::HostPolicy;
use crate::hypervisor::{
    DiskImage, DiskInfo, DiskView, Extent, HypervisorError, ImageFile, IncomingDisk,
};

/// Suffix of an image that arrives.
pub(crate) const PART_SUFFIX: &str = ".longhaul-part";
/// In every name that is Longhaul's own: no image is called so.
const OWN_NAMES: &str = ".longhaul-";
/// The longest name of an image: with all suffixes it still is a file name (255 bytes).
const NAME_BYTES_MAX: usize = 200;

/// An image that nobody runs, as a whole disk.
struct ImageView {
    info: DiskInfo,
    image: Box<dyn DiskImage>,
}

#[async_trait]
impl DiskView for ImageView {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        self.image.extents().await
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        self.image.read(offset, len).await
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        self.image.close().await
    }
}

/// How an image is encoded, by its name: what a guest wrote at its beginning decides nothing.
fn format_of(path: &Path) -> ImageFormat {
    match path.extension().is_some_and(|extension| extension == "qcow2") {
        true => ImageFormat::Qcow2,
        false => ImageFormat::Raw,
    }
}

fn unsupported(path: &Path, reason: impl Into<String>) -> HypervisorError {
    HypervisorError::Unsupported { vm: path.display().to_string(), reason: reason.into() }
}

/// Opens an image to read all of it. One that a QEMU has open is refused.
pub(super) async fn view(
    tools: &ImageTools,
    path: &Path,
) -> Result<Box<dyn DiskView>, HypervisorError> {
    refuse_in_use(path)?;
    let file = ImageFile { path: path.to_owned(), format: format_of(path) };
    let image = open_image(tools, &file, Access::Read).await?;
    let info = DiskInfo { id: "image".to_owned(), bytes: image.bytes() };
    Ok(Box::new(ImageView { info, image }))
}

/// Where an image of a pool lies, and where it is built. The name is a peer's.
fn places(
    policy: &HostPolicy,
    location: &ImageLocation,
) -> Result<(PathBuf, PathBuf), HypervisorError> {
    let refused = |reason| HypervisorError::Unsupported { vm: "this image".to_owned(), reason };
    if let ImageLocation::Pool { file, .. } = location {
        if file.is_empty() || file.starts_with('.') || file.contains(OWN_NAMES) {
            return Err(refused(format!("{file:?} is no name for an image")));
        }
        if file.len() > NAME_BYTES_MAX {
            return Err(refused(format!("its name is longer than {NAME_BYTES_MAX} bytes")));
        }
    }
    let path = policy.in_pool(location).map_err(refused)?;
    let part = beside(&path, PART_SUFFIX);
    match std::fs::symlink_metadata(&part) {
        Ok(meta) if !meta.is_file() => Err(unsupported(&part, "it is there, and is no plain file")),
        _ => Ok((path, part)),
    }
}

/// Opens what there is of an image that arrives, or begins it: with what lies under its name, as a
/// starting point, or with nothing. Of what lies there a copy is made only if it is to become
/// something else.
pub(super) async fn incoming(
    policy: &HostPolicy,
    tools: &ImageTools,
    location: &ImageLocation,
    bytes: u64,
    replace: bool,
) -> Result<IncomingDisk, HypervisorError> {
    let (path, part) = places(policy, location)?;
    may_take(&path, replace)?;
    let file = ImageFile { path: part.clone(), format: format_of(&path) };
    let mut fresh = false;
    if !part.exists() && path.exists() {
        let old = ImageFile { path: path.clone(), format: file.format };
        let image = BegunLater::open(tools, old, file.clone()).await?;
        if image.bytes() == bytes {
            let image = Box::new(image);
            let (format, begins_as) = (file.format, Some(path));
            return Ok(IncomingDisk { image, path: part, format, fresh, begins_as });
        }
        begin_from(&path, &part).await?;
    } else if !part.exists() {
        create_image(tools, &file, bytes).await?;
        fresh = true;
    }
    let mut image = open_image(tools, &file, Access::Write).await?;
    if image.bytes() != bytes {
        image.close().await?;
        match file.format {
            // What is there stays of use.
            ImageFormat::Raw => {
                let resized = OpenOptions::new().write(true).open(&part);
                let resized = resized.and_then(|file| file.set_len(bytes));
                resized.map_err(io_error("resizing", &part))?;
            }
            ImageFormat::Qcow2 => {
                std::fs::remove_file(&part).map_err(io_error("removing", &part))?;
                create_image(tools, &file, bytes).await?;
                fresh = true;
            }
        }
        image = open_image(tools, &file, Access::Write).await?;
    }
    Ok(IncomingDisk { image, path: part, format: file.format, fresh, begins_as: None })
}

/// Gives an image that is complete, durable and closed its name, unless the one of that name is what it
/// should be and nothing was begun beside it. Returns where it lies.
pub(super) fn settle(
    policy: &HostPolicy,
    location: &ImageLocation,
    replace: bool,
) -> Result<PathBuf, HypervisorError> {
    let (path, part) = places(policy, location)?;
    // Asked again: much time has gone.
    may_take(&path, replace)?;
    // Its record first: beside the image that was there it is a hint that hashes prove wrong, while
    // the old record would be one beside the new image.
    let (record, new_record) = (beside(&path, RECIPE_SUFFIX), beside(&part, RECIPE_SUFFIX));
    if new_record.exists() {
        std::fs::rename(&new_record, &record).map_err(io_error("renaming", &new_record))?;
    }
    if part.exists() || !path.exists() {
        std::fs::rename(&part, &path).map_err(io_error("giving its name to", &part))?;
    }
    let dir = path.parent().unwrap_or_else(|| Path::new("/"));
    let durable = File::open(dir).and_then(|dir| dir.sync_all());
    durable.map_err(io_error("making durable the name of", &path))?;
    Ok(path)
}

/// Whether a name may be given to an image that arrives.
fn may_take(path: &Path, replace: bool) -> Result<(), HypervisorError> {
    if !path.exists() {
        return Ok(());
    }
    if !replace {
        let reason = "there is an image of this name already, and nothing was changed: \
                      push with --replace to have it replaced";
        return Err(unsupported(path, reason));
    }
    refuse_in_use(path)
}

fn refuse_in_use(path: &Path) -> Result<(), HypervisorError> {
    match is_in_use(path).map_err(io_error("opening", path))? {
        true => {
            Err(unsupported(path, "a running VM or a tool of QEMU's has it open: end that first"))
        }
        false => Ok(()),
    }
}

fn io_error<'a>(doing: &'a str, path: &'a Path) -> impl Fn(io::Error) -> HypervisorError + 'a {
    move |source| HypervisorError::Io { doing: format!("{doing} {}", path.display()), source }
}
