//! This host as QEMU's: its VMs, the images that arrive, the QEMUs that wait for them.
//!
//! Invariant: what arrives lies under its final name only together with a mark that says that it is
//! not complete; the mark goes when the VM has settled. Nothing of an operator's is overwritten: an
//! image that is there and is not an earlier try of ours refuses the VM.
//!
//! ```text
//!  FILE                    the image, as the VM's description names it
//!  FILE.longhaul-incoming  the mark: the VM's name; FILE is not complete
//!  FILE.longhaul-recipe    what was written to FILE, kept as a hint for later moves
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::{Mutex, OnceCell};

use super::args::Role;
use super::image::{Access, ImageTools, create_image, open_image};
use super::launch::{QemuHandle, launch, running_vms};
use super::probe::QemuFacts;
use super::source::QemuSource;
use super::target::QemuTarget;
use super::{check, pool, status};
use crate::hypervisor::spec::host::{HostPolicy, ResolvedVm, resolve};
use crate::hypervisor::spec::{DiskSpec, ImageLocation};
use crate::hypervisor::{
    DiskInfo, DiskView, Host, HypervisorError, ImageFile, IncomingDisk, RunState, SourceVm,
    TargetVm, VmSpec,
};

pub(crate) use super::pool::PART_SUFFIX;

/// Suffix of the mark beside an image that is arriving.
const INCOMING_SUFFIX: &str = ".longhaul-incoming";
/// Suffix of the record beside an image; `dedup` keeps it.
pub(crate) const RECIPE_SUFFIX: &str = ".longhaul-recipe";
/// Images that are considered as places to copy from.
const KNOWN_IMAGES_MAX: usize = 4096;

/// The book of this host's VMs. It survives restarts; what it says is durable on return.
#[async_trait]
pub trait VmBook: Send + Sync {
    /// What a VM of this host's is.
    fn get(&self, vm: &str) -> Option<VmSpec>;
    /// Whether one has a QEMU, whatever that is doing.
    fn runs(&self, vm: &str) -> bool;
    /// The running QEMU of one. A monitor serves one client at a time: everybody shares this one.
    async fn handle(&self, vm: &str) -> Result<QemuHandle, HypervisorError>;
    /// A VM is this host's from now on; `handle` is its QEMU, if it has one.
    async fn arrived(&self, vm: &VmSpec, handle: Option<QemuHandle>) -> Result<(), String>;
    /// A VM runs elsewhere now; its images here are left-overs.
    async fn departed(&self, vm: &str) -> Result<(), String>;
    /// A VM that departed is this host's again.
    async fn reclaim(&self, vm: &str) -> Result<(), String>;
    /// Whether a file is an image that a departed VM of this name left here.
    fn left_behind(&self, vm: &str, image: &Path) -> bool;
}

/// This host.
pub struct QemuHost {
    policy: HostPolicy,
    tools: ImageTools,
    book: Arc<dyn VmBook>,
    /// QEMUs that wait for a VM, or hold one that was not taken in yet.
    arriving: Mutex<HashMap<String, QemuHandle>>,
    /// What the program can be; asked once.
    facts: OnceCell<QemuFacts>,
}

impl QemuHost {
    /// A host on which `policy` holds.
    pub fn new(policy: HostPolicy, tools: ImageTools, book: Arc<dyn VmBook>) -> Self {
        Self { policy, tools, book, arriving: Mutex::default(), facts: OnceCell::new() }
    }

    /// What its operator allows.
    pub fn policy(&self) -> &HostPolicy {
        &self.policy
    }

    async fn facts(&self) -> Result<&QemuFacts, HypervisorError> {
        let ask = || QemuFacts::ask(&self.policy.qemu, &self.policy.run_dir);
        self.facts.get_or_try_init(ask).await
    }

    fn resolve(&self, vm: &VmSpec) -> Result<ResolvedVm, HypervisorError> {
        resolve(vm, &self.policy).map_err(|reasons| HypervisorError::Unsupported {
            vm: vm.name.clone(),
            reason: reasons.join("; "),
        })
    }

    fn images(&self, vm: &VmSpec) -> Result<Vec<ImageFile>, HypervisorError> {
        let resolved = self.resolve(vm)?;
        let formats = resolved.spec.disks.iter().map(|disk| disk.format);
        Ok(resolved
            .disks
            .iter()
            .zip(formats)
            .map(|(disk, format)| ImageFile { path: disk.path.clone(), format })
            .collect())
    }

    /// The QEMU of a VM that has arrived, or is arriving, and is not in the book; `None` if its
    /// process has ended.
    async fn arrived_handle(&self, vm: &str) -> Result<Option<QemuHandle>, HypervisorError> {
        let mut arriving = self.arriving.lock().await;
        if let Some(handle) = arriving.get(vm)
            && handle.is_alive()
            && !handle.qmp.is_closed()
        {
            return Ok(Some(handle.clone()));
        }
        arriving.remove(vm);
        let mut running = running_vms(&self.policy.run_dir).into_iter();
        let Some(running) = running.find(|run| run.record.spec.name == vm) else { return Ok(None) };
        let handle = running.attach().await?;
        arriving.insert(vm.to_owned(), handle.clone());
        Ok(Some(handle))
    }

    /// Whether an image that is there may be written to for this VM.
    fn is_ours(&self, vm: &str, image: &Path) -> bool {
        let marked = std::fs::read_to_string(beside(image, INCOMING_SUFFIX));
        marked.is_ok_and(|name| name.trim() == vm) || self.book.left_behind(vm, image)
    }
}

#[async_trait]
impl Host for QemuHost {
    async fn source(&self, vm: &str) -> Result<Arc<dyn SourceVm>, HypervisorError> {
        let handle = self.book.handle(vm).await?;
        let spec = handle.spec.clone();
        let in_pool = |disk: &DiskSpec| self.policy.in_pool(&disk.location).ok();
        let images = spec.disks.iter().map(in_pool).collect();
        Ok(Arc::new(QemuSource::new(spec, images, handle).await?))
    }

    fn knows(&self, vm: &str) -> bool {
        self.book.get(vm).is_some()
    }

    async fn runs(&self, vm: &str) -> bool {
        self.book.runs(vm)
    }

    async fn departed(&self, vm: &str) -> Result<(), HypervisorError> {
        let departed = self.book.departed(vm).await.map_err(std::io::Error::other);
        departed.map_err(|source| HypervisorError::Io {
            doing: format!("{vm}: taking it out of this host's book"),
            source,
        })
    }

    async fn refusals(
        &self,
        vm: &VmSpec,
        disks: &[DiskInfo],
    ) -> Result<Vec<String>, HypervisorError> {
        let disk_bytes: Vec<u64> = disks.iter().map(|disk| disk.bytes).collect();
        let facts = self.facts().await?;
        let mut reasons = check::can_host(vm, &self.policy, facts, &disk_bytes);
        if self.book.get(&vm.name).is_some() {
            reasons.push(format!("there is a VM called {} here already", vm.name));
        }
        if !reasons.is_empty() {
            return Ok(reasons);
        }
        for image in self.images(vm)? {
            if image.path.exists() && !self.is_ours(&vm.name, &image.path) {
                reasons.push(format!(
                    "{} is there already and is not an earlier try of this VM's: move it away",
                    image.path.display()
                ));
            }
        }
        Ok(reasons)
    }

    async fn incoming_disks(
        &self,
        vm: &VmSpec,
        disks: &[DiskInfo],
    ) -> Result<Vec<IncomingDisk>, HypervisorError> {
        let mut incoming = Vec::new();
        for (file, info) in self.images(vm)?.into_iter().zip(disks) {
            if file.path.exists() && !self.is_ours(&vm.name, &file.path) {
                return Err(HypervisorError::Unsupported {
                    vm: vm.name.clone(),
                    reason: format!("{} is there already", file.path.display()),
                });
            }
            let mark = beside(&file.path, INCOMING_SUFFIX);
            std::fs::write(&mark, format!("{}\n", vm.name)).map_err(|source| {
                HypervisorError::Io { doing: format!("writing {}", mark.display()), source }
            })?;
            let mut fresh = !file.path.exists();
            if fresh {
                create_image(&self.tools, &file, info.bytes).await?;
            }
            let mut image = open_image(&self.tools, &file, Access::Write).await?;
            if image.bytes() != info.bytes {
                // An earlier try of another size: what it holds is found again by its hashes
                // nowhere else, so it goes.
                image.close().await?;
                remove(&file.path)?;
                create_image(&self.tools, &file, info.bytes).await?;
                image = open_image(&self.tools, &file, Access::Write).await?;
                fresh = true;
            }
            incoming.push(IncomingDisk {
                image,
                path: file.path,
                format: file.format,
                fresh,
                begins_as: None,
            });
        }
        Ok(incoming)
    }

    async fn known_images(&self) -> Result<Vec<ImageFile>, HypervisorError> {
        let mut known = Vec::new();
        for dir in self.policy.pools.values() {
            let Ok(entries) = std::fs::read_dir(dir) else { continue };
            for entry in entries.flatten().take(KNOWN_IMAGES_MAX) {
                let recipe = entry.path();
                let Some(image) = recipe.to_str().and_then(|path| path.strip_suffix(RECIPE_SUFFIX))
                else {
                    continue;
                };
                let path = PathBuf::from(image);
                let Some(format) = status::image_format(&path) else { continue };
                known.push(ImageFile { path, format });
            }
        }
        Ok(known)
    }

    async fn image(&self, path: &Path) -> Result<Box<dyn DiskView>, HypervisorError> {
        pool::view(&self.tools, path).await
    }

    async fn incoming_image(
        &self,
        place: &ImageLocation,
        bytes: u64,
        replace: bool,
    ) -> Result<IncomingDisk, HypervisorError> {
        pool::incoming(&self.policy, &self.tools, place, bytes, replace).await
    }

    async fn settle_image(
        &self,
        place: &ImageLocation,
        replace: bool,
    ) -> Result<PathBuf, HypervisorError> {
        pool::settle(&self.policy, place, replace)
    }

    async fn prepare(&self, vm: &VmSpec) -> Result<Arc<dyn TargetVm>, HypervisorError> {
        let resolved = self.resolve(vm)?;
        let handle = launch(&resolved, Role::Incoming, &self.policy.run_dir).await?;
        self.arriving.lock().await.insert(vm.name.clone(), handle.clone());
        Ok(Arc::new(QemuTarget::new(handle)))
    }

    async fn prepared(&self, vm: &str) -> Result<Option<Arc<dyn TargetVm>>, HypervisorError> {
        if self.book.get(vm).is_some() {
            return Ok(None);
        }
        let handle = self.arrived_handle(vm).await?;
        Ok(handle.map(|handle| Arc::new(QemuTarget::new(handle)) as Arc<dyn TargetVm>))
    }

    async fn settle(&self, vm: &VmSpec) -> Result<(), HypervisorError> {
        let handle = self.arriving.lock().await.remove(&vm.name);
        let spec = self.resolve(vm)?.spec;
        let added = self.book.arrived(&spec, handle).await.map_err(std::io::Error::other);
        added.map_err(|source| HypervisorError::Io {
            doing: format!("{}: entering it in this host's book", vm.name),
            source,
        })?;
        for image in self.images(vm)? {
            remove(&beside(&image.path, INCOMING_SUFFIX))?;
        }
        Ok(())
    }

    async fn reclaim(&self, vm: &str) -> Result<(), HypervisorError> {
        let reclaimed = self.book.reclaim(vm).await.map_err(std::io::Error::other);
        reclaimed.map_err(|source| HypervisorError::Io {
            doing: format!("{vm}: entering it in this host's book again"),
            source,
        })
    }

    async fn pause(&self, vm: &str) -> Result<(), HypervisorError> {
        let handle = match self.book.get(vm) {
            Some(_) if !self.book.runs(vm) => None,
            Some(_) => Some(self.book.handle(vm).await?),
            None => self.arrived_handle(vm).await?,
        };
        let Some(handle) = handle else { return Ok(()) };
        handle.qmp.execute("stop", json!({})).await?;
        match handle.run_state().await? {
            RunState::Running => Err(HypervisorError::Unexpected {
                vm: vm.to_owned(),
                detail: "it runs though it was stopped".to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

pub(super) fn beside(image: &Path, suffix: &str) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn remove(path: &Path) -> Result<(), HypervisorError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(HypervisorError::Io { doing: format!("removing {}", path.display()), source })
        }
        _ => Ok(()),
    }
}
