//! A VM of a QEMU of this host's, as one that may leave.
//!
//! Invariant: this file only joins the parts; each call is one of `disk`'s, `memory`'s or
//! `launch`'s, and says what it observed.

use std::path::PathBuf;
use std::time::Instant;

use async_trait::async_trait;

use super::disk::{SourceDisks, SourceDisksConfig};
use super::launch::QemuHandle;
use super::memory::SourceMemory;
use super::{check, status};
use crate::hypervisor::{
    DiskInfo, DiskView, HypervisorError, MemoryProgress, MemorySource, RunState, SourceVm, VmSpec,
};

/// What the tracking of writes is for; one at a time.
const TRACKING: &str = "move";

/// A VM that runs here.
pub(super) struct QemuSource {
    spec: VmSpec,
    images: Vec<Option<PathBuf>>,
    handle: QemuHandle,
    disks: SourceDisks,
    memory: SourceMemory,
}

impl QemuSource {
    /// The VM that `spec` describes and that runs behind `handle`; for `images` see
    /// [`SourceVm::images`].
    pub(super) async fn new(
        spec: VmSpec,
        images: Vec<Option<PathBuf>>,
        handle: QemuHandle,
    ) -> Result<Self, HypervisorError> {
        let nodes = status::disk_nodes(&handle.qmp, &spec).await?;
        let disks = SourceDisks::new(
            handle.qmp.clone(),
            SourceDisksConfig {
                disks: nodes,
                run_dir: handle.paths.dir.clone(),
                tracking: TRACKING.to_owned(),
                pid: u32::try_from(handle.process.pid).ok(),
            },
        )?;
        let memory = SourceMemory::new(handle.qmp.clone(), handle.paths.migration.clone());
        Ok(Self { spec, images, handle, disks, memory })
    }
}

#[async_trait]
impl SourceVm for QemuSource {
    fn spec(&self) -> &VmSpec {
        &self.spec
    }

    async fn check(&self) -> Result<Vec<String>, HypervisorError> {
        let mut reasons = check::leaving(&self.handle.qmp).await?;
        reasons.extend(self.disks.check().await?);
        // A machine without it would be another one, and refuse this one's state.
        let lacks = |what: &String| format!("it cannot be built again elsewhere: {what}");
        reasons.extend(self.handle.not_understood.iter().map(lacks));
        Ok(reasons)
    }

    async fn run_state(&self) -> Result<RunState, HypervisorError> {
        self.handle.run_state().await
    }

    async fn disks(&self) -> Result<Vec<DiskInfo>, HypervisorError> {
        self.disks.disks().await
    }

    fn images(&self) -> Vec<Option<PathBuf>> {
        self.images.clone()
    }

    async fn disk_full(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError> {
        self.disks.disk_full().await
    }

    async fn is_tracking(&self) -> Result<bool, HypervisorError> {
        self.disks.is_tracking().await
    }

    async fn disk_delta(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError> {
        self.disks.disk_delta().await
    }

    async fn disk_delta_bytes(&self) -> Result<u64, HypervisorError> {
        self.disks.disk_delta_bytes().await
    }

    async fn start_memory(&self) -> Result<Box<dyn MemorySource>, HypervisorError> {
        Ok(Box::new(self.memory.start().await?))
    }

    async fn memory_note(&self) -> Option<String> {
        self.memory.note().await
    }

    async fn memory_progress(&self) -> Result<MemoryProgress, HypervisorError> {
        self.memory.progress().await
    }

    async fn set_memory_rate(&self, bytes_per_s: u64) -> Result<(), HypervisorError> {
        self.memory.set_rate(bytes_per_s).await
    }

    async fn allow_switchover(&self) -> Result<(), HypervisorError> {
        self.memory.allow_switchover().await
    }

    async fn wait_paused(&self) -> Result<Instant, HypervisorError> {
        self.memory.wait_paused().await
    }

    async fn finish_memory(&self) -> Result<(), HypervisorError> {
        self.memory.finish().await
    }

    async fn wait_parked(&self) -> Result<(), HypervisorError> {
        self.memory.wait_parked().await
    }

    async fn rollback(&self, ran: bool) -> Result<(), HypervisorError> {
        self.memory.rollback(ran).await
    }

    async fn destroy(&self) -> Result<(), HypervisorError> {
        self.handle.quit().await
    }

    async fn cleanup(&self, keep_tracking: bool) -> Result<(), HypervisorError> {
        self.disks.cleanup(keep_tracking).await
    }
}
