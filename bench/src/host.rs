//! Two Longhaul agents, one at each end of a WAN, driven by the command line as an operator would.
//!
//! Invariant: everything that is known about the product's command line and files stands in this
//! file, and the agents end with the value that started them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub use crate::agent::longhaul_binary;
use crate::agent::{self, Agent, POINTS, POLL_PERIOD, Place, ask, config, find, images, status};
use crate::guest::Guest;
use crate::netns::Side;
use crate::rival;
use crate::wan::Wan;

/// The environment's name for the product's binary.
pub const BINARY_VARIABLE: &str = "LONGHAUL_BIN";
/// The VM's name at both ends.
pub const VM: &str = "guest";
/// The pool that the source's disk lies in and the target's arrives in.
pub(crate) const POOL: &str = "default";
/// The agents' UDP port.
pub(crate) const PORT: u16 = 4873;
/// How long a test may wait for an agent's end: what ends it may come late in a migration.
const END_WAIT: Duration = Duration::from_secs(240);

/// Two paired agents.
#[derive(Debug)]
pub struct AgentPair {
    program: PathBuf,
    agents: [Agent; 2],
}

impl AgentPair {
    /// Starts an agent in each namespace, with its files in a folder of its own, and pairs them.
    /// `qemus` are folders that `bench/setup/qemu` printed, for each side.
    ///
    /// # Errors
    ///
    /// When an agent does not start or answer; its log is `agent.log` in its folder.
    pub fn start(
        wan: &Wan,
        folders: &[PathBuf; 2],
        qemus: [&Path; 2],
        accel: &str,
    ) -> Result<Self> {
        let program = longhaul_binary()?;
        let start = |side: Side| {
            let (folder, qemu) = (&folders[side as usize], qemus[side as usize]);
            let place = Place { side, port: PORT, name: side.letter().to_owned() };
            agent::start(wan, &program, place, folder, (qemu, accel), |_| {})
        };
        let agents = [start(Side::A)?, start(Side::B)?];
        agent::pair_all(&program, &agents)?;
        Ok(Self { program, agents })
    }

    /// The product's binary that these agents run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where the serial console of the VM is at one end, once it is there.
    pub fn console(&self, side: Side) -> PathBuf {
        self.folder(side).join("run/vm").join(VM).join("serial0.sock")
    }

    /// The folder of an agent's only pool: disks lie and arrive there.
    pub fn images(&self, side: Side) -> PathBuf {
        images(self.folder(side))
    }

    /// Starts the guest at side a; `disk` lies in that side's [`images`](Self::images).
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn start_vm(&self, guest: &Guest, disk: &Path) -> Result<()> {
        self.start_described(&description(guest, disk)?)
    }

    /// Starts the VM of this description, see [`description`], at side a.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn start_described(&self, description: &Value) -> Result<()> {
        self.agents[Side::A as usize].start_vm(&self.program, description, "vm.toml")
    }

    /// Sends the disk ahead and waits until it is there.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn seed(&self) -> Result<Value> {
        self.ask(Side::A, &["seed", VM, "--to", Side::B.letter()])
    }

    /// Moves the VM from a to b and gives the agent's report.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn migrate(&self) -> Result<Value> {
        let answer = self.ask(Side::A, &["migrate", VM, "--to", Side::B.letter()])?;
        Ok(find(&answer, "completed").unwrap_or(&answer).clone())
    }

    /// As [`migrate`](Self::migrate), with the command's own progress and report shown to whoever
    /// watches.
    ///
    /// # Errors
    ///
    /// That the command failed; it has said why.
    pub fn migrate_shown(&self) -> Result<Value> {
        let status = Command::new(&self.program)
            .arg("--config")
            .arg(config(self.folder(Side::A)))
            .args(["migrate", VM, "--to", Side::B.letter()])
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("while running {}", self.program.display()))?;
        ensure!(status.success(), "longhaul migrate failed ({status})");
        let last = self.status(Side::A)?;
        let completed = find(&last, "completed").context("the agent remembers no move")?;
        Ok(completed.clone())
    }

    /// Cancels whatever moves the VM.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn cancel(&self) -> Result<()> {
        self.ask(Side::A, &["cancel", VM]).map(|_| ())
    }

    /// The agent's status at one end.
    ///
    /// # Errors
    ///
    /// The agent's own words.
    pub fn status(&self, side: Side) -> Result<Value> {
        status(&self.program, self.folder(side))
    }

    /// The folder of the points at which one agent is to stop; only agents of a test build look.
    pub fn points(&self, side: Side) -> PathBuf {
        self.folder(side).join(POINTS)
    }

    /// The process of one agent.
    pub fn pid(&self, side: Side) -> u32 {
        self.agents[side as usize].child.id()
    }

    /// Waits until no VM runs at one end.
    ///
    /// # Errors
    ///
    /// When one still does after that time.
    pub fn wait_vm_gone(&self, side: Side, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let vms = self.ask(side, &["vm", "list"])?;
            if !vms.to_string().contains("\"running\"") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the guest does not power off");
            std::thread::sleep(POLL_PERIOD);
        }
    }

    /// Asks one agent to end, as its service manager would, and waits for it. VMs run on.
    ///
    /// # Errors
    ///
    /// When it does not end in time, or was gone before.
    pub fn stop(&mut self, side: Side) -> Result<()> {
        let agent = &mut self.agents[side as usize];
        ensure!(agent.terminate()?, "the agent {} does not end", side.letter());
        Ok(())
    }

    /// Ends one agent as a crash would, without a word.
    ///
    /// # Errors
    ///
    /// When it was gone before.
    pub fn kill(&mut self, side: Side) -> Result<()> {
        self.agents[side as usize].kill()
    }

    /// Waits until an agent has ended by itself, or by somebody else's hand.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn wait_end(&mut self, side: Side) -> Result<()> {
        let deadline = Instant::now() + END_WAIT;
        while self.agents[side as usize].child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "the agent {} lives", side.letter());
            std::thread::sleep(POLL_PERIOD);
        }
        Ok(())
    }

    /// Starts an agent that was killed or stopped again, on what it left.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn restart(&mut self, wan: &Wan, side: Side) -> Result<()> {
        self.agents[side as usize].restart(wan, &self.program)
    }

    /// Runs a command against one agent with `--json` and gives its last line.
    ///
    /// # Errors
    ///
    /// The command's own words.
    pub fn ask(&self, side: Side, arguments: &[&str]) -> Result<Value> {
        ask(&self.program, self.folder(side), arguments)
    }

    /// The folder with everything of one agent's: `agent.toml`, `agent.log`, `state`, `run`, `images`.
    pub fn folder(&self, side: Side) -> &Path {
        &self.agents[side as usize].folder
    }
}

/// The guest as the product wants it described.
///
/// # Errors
///
/// When the disk's path has no name.
pub fn description(guest: &Guest, disk: &Path) -> Result<Value> {
    let machine = &guest.machine;
    let file = disk.file_name().and_then(|name| name.to_str()).context("the disk has no name")?;
    let at = |path: &Path| serde_json::json!({"path": path});
    Ok(serde_json::json!({
        "name": VM,
        "machine": rival::MACHINE,
        "cpu": {"model": rival::CPU},
        "vcpus": machine.cpus,
        "memory_mib": machine.memory_mib,
        "kernel": {
            "kernel": at(&guest.kernel),
            "initrd": at(&guest.initrd),
            "append": machine.append,
        },
        "disks": [{
            "id": "disk0",
            "location": {"pool": POOL, "file": file},
            "format": machine.format,
            "bus": "virtio-blk",
            "discard": true,
        }],
        "devices": [{"id": "serial0", "model": "serial"}],
    }))
}
