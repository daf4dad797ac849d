//! What the target's QEMU is told while memory arrives, and the one command that starts it.
//!
//! Invariant: the VM does not run, and announces nothing, before [`TargetMemory::run`]; that sends
//! `cont` only to a QEMU that has loaded its whole state. Earlier it would not fail: QEMU would
//! remember it and run the VM as soon as the stream ends.
//!
//! The QEMU must have been started with `-incoming defer -S`.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tokio::net::UnixStream;

use super::status::{Phase, Wait, set_capabilities, set_parameters, unexpected};
use super::{QemuMemorySink, check_socket_path};
use crate::hypervisor::qemu::qmp::Qmp;
use crate::hypervisor::{HypervisorError, NotRunning};

/// How long QEMU may take from the stream's end to having loaded it.
const LOAD_WITHIN: Duration = Duration::from_secs(180);

/// How long QEMU may take to start the CPUs, after it has opened the disks.
const RUN_WITHIN: Duration = Duration::from_secs(60);

/// The first QEMU that can survive a stream which it refuses, and say why.
const KEEPS_RUNNING: (u32, u32, u32) = (9, 1, 0);

/// The memory half of a VM that arrives.
#[derive(Debug, Clone)]
pub struct TargetMemory {
    qmp: Qmp,
    socket: PathBuf,
}

impl TargetMemory {
    /// Will have the QEMU behind `qmp` listen at `socket`.
    pub fn new(qmp: Qmp, socket: PathBuf) -> Self {
        Self { qmp, socket }
    }

    /// Opens the memory stream into QEMU. A process can do this once; to try again, start another.
    ///
    /// # Errors
    ///
    /// `Refused` with QEMU's words, or `Io` if its socket cannot be connected to.
    pub async fn open(&self) -> Result<QemuMemorySink, HypervisorError> {
        let vm = self.qmp.vm();
        check_socket_path(vm, &self.socket)?;
        set_capabilities(&self.qmp, &["events", "late-block-activate"]).await?;
        // The VM is announced when it runs, not when it is loaded.
        let quiet = ("announce-rounds", json!(0));
        set_parameters(&self.qmp, &[quiet, ("tls-creds", json!(""))]).await?;
        let mut arguments = json!({"uri": format!("unix:{}", self.socket.display())});
        if self.qmp.version() >= KEEPS_RUNNING {
            arguments["exit-on-error"] = json!(false);
        }
        self.qmp.execute("migrate-incoming", arguments).await?;
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| HypervisorError::Io {
            doing: format!("{vm}: connecting to its memory socket {}", self.socket.display()),
            source,
        })?;
        Ok(QemuMemorySink::new(vm, stream))
    }

    /// Returns once QEMU has accepted the whole state and waits, stopped.
    ///
    /// # Errors
    ///
    /// `Unexpected` with QEMU's words if it refused the state. QEMU before 9.1 exits instead, which
    /// is `Gone`: what it printed last says why. `Gone` also if it is not done in time.
    pub async fn wait_loaded(&self) -> Result<(), HypervisorError> {
        let mut wait = Wait::begin(&self.qmp, "the state to be loaded", LOAD_WITHIN);
        loop {
            let migration = wait.migration().await?;
            match migration.status {
                Phase::Completed => match wait.status().await? {
                    status if status.running => {
                        return Err(HypervisorError::Unexpected {
                            vm: self.qmp.vm().to_owned(),
                            detail: "it runs though nobody started it: was it started without -S?"
                                .to_owned(),
                        });
                    }
                    status if status.status != "inmigrate" => return Ok(()),
                    _ => {}
                },
                Phase::None | Phase::Setup | Phase::Active | Phase::Device | Phase::Other => {}
                _ => return Err(unexpected(&self.qmp, &migration, "loaded")),
            }
            wait.again().await?;
        }
    }

    /// Makes the arrived VM run and announces it on its networks. Only the hand-over may call this.
    /// A VM that runs already stays as it is and is announced again.
    ///
    /// # Errors
    ///
    /// `NeverDid` if QEMU was not told because it has not loaded the whole state or is gone, or if it
    /// refused; `MayHave` if it was told and not observed to run in time.
    pub async fn run(&self) -> Result<(), NotRunning> {
        let mut wait = Wait::begin(&self.qmp, "the VM to run", RUN_WITHIN);
        let migration = wait.migration().await.map_err(NotRunning::NeverDid)?;
        let status = wait.status().await.map_err(NotRunning::NeverDid)?;
        if !status.running {
            if migration.status != Phase::Completed || status.status == "inmigrate" {
                let error = unexpected(&self.qmp, &migration, "loaded: it was not started");
                return Err(NotRunning::NeverDid(error));
            }
            match self.qmp.execute("cont", json!({})).await {
                Ok(_) => {}
                Err(error @ HypervisorError::Refused { .. }) => {
                    return Err(NotRunning::NeverDid(error));
                }
                Err(error) => return Err(NotRunning::MayHave(error)),
            }
            while !wait.status().await.map_err(NotRunning::MayHave)?.running {
                wait.again().await.map_err(NotRunning::MayHave)?;
            }
        }
        // The guest runs, whatever becomes of this: networks also learn from its own packets.
        let announce = json!({"initial": 50, "max": 550, "rounds": 10, "step": 50});
        if let Err(error) = self.qmp.execute("announce-self", announce).await {
            tracing::warn!(vm = self.qmp.vm(), %error, "the VM could not be announced");
        }
        Ok(())
    }
}
