//! A QEMU of this host's that waits for a VM, or holds one that has just arrived.
//!
//! Invariant: it was started with `-incoming defer -S`; `run` is the only thing that ends that.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;

use super::launch::QemuHandle;
use super::memory::TargetMemory;
use crate::hypervisor::{HypervisorError, MemorySink, NotRunning, RunState, TargetVm};

/// A VM that is arriving here.
pub(super) struct QemuTarget {
    handle: QemuHandle,
    memory: TargetMemory,
    was_run: AtomicBool,
}

impl QemuTarget {
    /// The QEMU behind `handle`.
    pub(super) fn new(handle: QemuHandle) -> Self {
        let memory = TargetMemory::new(handle.qmp.clone(), handle.paths.migration.clone());
        Self { handle, memory, was_run: AtomicBool::new(false) }
    }
}

#[async_trait]
impl TargetVm for QemuTarget {
    async fn open_memory(&self) -> Result<Box<dyn MemorySink>, HypervisorError> {
        Ok(Box::new(self.memory.open().await?))
    }

    async fn wait_loaded(&self) -> Result<(), HypervisorError> {
        match self.memory.wait_loaded().await {
            // QEMU's last words name the device that it could not load.
            Err(HypervisorError::Gone { vm, detail }) => {
                let detail = format!("{detail}; its last words: {}", self.handle.last_words());
                Err(HypervisorError::Gone { vm, detail })
            }
            loaded => loaded,
        }
    }

    async fn run(&self) -> Result<(), NotRunning> {
        self.memory.run().await?;
        self.was_run.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn run_state(&self) -> Result<RunState, HypervisorError> {
        match self.handle.run_state().await? {
            // It has loaded its state: QEMU calls that paused, but nobody has paused it.
            RunState::Paused if !self.was_run.load(Ordering::Relaxed) => Ok(RunState::Incoming),
            state => Ok(state),
        }
    }

    async fn destroy(&self) -> Result<(), HypervisorError> {
        self.handle.kill().await
    }
}
