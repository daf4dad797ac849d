//! Two Longhaul agents, one at each end of a WAN, driven by the command line as an operator would.
//!
//! Invariant: everything that is known about the product's command line and files stands in this
//! file, and the agents end with the value that started them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

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
/// The environment's name for the folder of points at which an agent of a test build stops, and that
/// folder within the agent's.
const POINTS_VARIABLE: &str = "LONGHAUL_POINTS";
const POINTS: &str = "points";
/// How `longhaul status` ends if a hand-over is not settled.
const EXIT_IN_DOUBT: i32 = 3;
/// The agents' UDP port.
const PORT: u16 = 4873;
/// How long an agent may take to answer after its start, and to end.
const AGENT_WAIT: Duration = Duration::from_secs(30);
/// How long a test may wait for an agent's end: what ends it may come late in a migration.
const END_WAIT: Duration = Duration::from_secs(240);
const POLL_PERIOD: Duration = Duration::from_millis(50);

/// Two paired agents.
#[derive(Debug)]
pub struct AgentPair {
    program: PathBuf,
    agents: [Agent; 2],
}

#[derive(Debug)]
struct Agent {
    side: Side,
    folder: PathBuf,
    child: Child,
}

/// The product's binary: `LONGHAUL_BIN`, else beside this program, else a folder above it (where
/// cargo puts tests).
///
/// # Errors
///
/// When it is at none of these places.
pub fn longhaul_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("while looking for the longhaul binary")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("longhaul"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no longhaul beside {}: build it or set {BINARY_VARIABLE}", own.display())
        })
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
            start_agent(wan, &program, side, folder, qemu, accel)
        };
        let agents = [start(Side::A)?, start(Side::B)?];
        let pair = Self { program, agents };
        for side in Side::BOTH {
            let peer = side.other();
            let identity = pair.ask(peer, &["pair"])?;
            let fingerprint =
                find(&identity, "fingerprint").and_then(Value::as_str).with_context(|| {
                    format!("the agent {} shows no fingerprint: {identity}", peer.letter())
                })?;
            let address = format!("{}:{PORT}", peer.address());
            pair.ask(side, &["pair", peer.letter(), &address, fingerprint])?;
        }
        Ok(pair)
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
        let file = self.folder(Side::A).join("vm.toml");
        std::fs::write(&file, toml::to_string(description)?)
            .with_context(|| format!("while writing {}", file.display()))?;
        let file = file.to_str().context("the scratch folder's name is not UTF-8")?;
        self.ask(Side::A, &["vm", "start", file]).map(|_| ())
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
        let agent = &mut self.agents[side as usize];
        agent.child.kill().context("while killing an agent")?;
        agent.child.wait()?;
        Ok(())
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
        let agent = &mut self.agents[side as usize];
        agent.child = spawn(wan, &self.program, side, &agent.folder)?;
        wait_answer(&self.program, &agent.folder, &mut agent.child)
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

impl Agent {
    /// Whether it ends in time when it is asked to.
    fn terminate(&mut self) -> Result<bool> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).context("while ending an agent")?;
        }
        let deadline = Instant::now() + AGENT_WAIT;
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(POLL_PERIOD);
        }
        Ok(false)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Guests do not end with their agent: these do, they are the harness's own.
        if let Ok(program) = longhaul_binary() {
            let _ = ask(&program, &self.folder, &["vm", "stop", VM, "--force"]);
        }
        if matches!(self.terminate(), Ok(true)) {
            return;
        }
        eprintln!("lab: the agent {} did not end by itself", self.side.letter());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start_agent(
    wan: &Wan,
    program: &Path,
    side: Side,
    folder: &Path,
    qemu: &Path,
    accel: &str,
) -> Result<Agent> {
    let output = Command::new(program)
        .args(["init", "--name", side.letter()])
        .args(["--listen", &format!("{}:{PORT}", side.address()), "--dir"])
        .arg(folder)
        .output()
        .with_context(|| format!("while running {}", program.display()))?;
    ensure!(
        output.status.success(),
        "longhaul init failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    configure(&config(folder), folder, qemu, accel)?;
    let child = spawn(wan, program, side, folder)?;
    let mut agent = Agent { side, folder: folder.to_owned(), child };
    wait_answer(program, folder, &mut agent.child)?;
    Ok(agent)
}

fn config(folder: &Path) -> PathBuf {
    folder.join("agent.toml")
}

fn images(folder: &Path) -> PathBuf {
    folder.join("images")
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

/// Names the lab's QEMU and a pool in the configuration that `init` wrote.
fn configure(file: &Path, folder: &Path, qemu: &Path, accel: &str) -> Result<()> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("while reading {}", file.display()))?;
    let mut config: toml::Table =
        toml::from_str(&text).with_context(|| format!("in {}", file.display()))?;
    let text = |path: PathBuf| toml::Value::String(path.display().to_string());
    let images = images(folder);
    std::fs::create_dir_all(&images)?;
    let mut section = toml::Table::new();
    for (key, name) in [("system", "qemu-system-x86_64"), ("img", "qemu-img"), ("nbd", "qemu-nbd")]
    {
        section.insert(key.to_owned(), text(qemu.join("bin").join(name)));
    }
    section.insert("accel".to_owned(), toml::Value::String(accel.to_owned()));
    config.insert("qemu".to_owned(), toml::Value::Table(section));
    let pools = toml::Table::from_iter([(POOL.to_owned(), text(images))]);
    config.insert("pools".to_owned(), toml::Value::Table(pools));
    std::fs::write(file, toml::to_string(&config)?)
        .with_context(|| format!("while writing {}", file.display()))
}

fn spawn(wan: &Wan, program: &Path, side: Side, folder: &Path) -> Result<Child> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("agent.log"))
        .context("while creating the agent's log")?;
    wan.command(side, program)
        .arg("--config")
        .arg(config(folder))
        .arg("agent")
        .env(POINTS_VARIABLE, folder.join(POINTS))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("while starting {}", program.display()))
}

fn wait_answer(program: &Path, folder: &Path, child: &mut Child) -> Result<()> {
    let deadline = Instant::now() + AGENT_WAIT;
    loop {
        match status(program, folder) {
            Ok(_) => return Ok(()),
            Err(error) => {
                let is_gone = matches!(child.try_wait(), Ok(Some(_)));
                if is_gone || Instant::now() > deadline {
                    let log = std::fs::read_to_string(folder.join("agent.log")).unwrap_or_default();
                    return Err(
                        error.context(format!("the agent does not answer; its log:\n{log}"))
                    );
                }
            }
        }
        std::thread::sleep(POLL_PERIOD);
    }
}

fn ask(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Value> {
    let output = run(program, folder, arguments)?;
    parse(&output, arguments, output.status.success())
}

fn status(program: &Path, folder: &Path) -> Result<Value> {
    let output = run(program, folder, &["status"])?;
    // That something is in doubt is an answer, too.
    let is_answer = output.status.success() || output.status.code() == Some(EXIT_IN_DOUBT);
    parse(&output, &["status"], is_answer)
}

fn run(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Output> {
    Command::new(program)
        .arg("--config")
        .arg(config(folder))
        .arg("--json")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("while running {}", program.display()))
}

fn parse(output: &Output, arguments: &[&str], is_answer: bool) -> Result<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    if !is_answer {
        bail!(
            "longhaul {} failed ({}): {}{}",
            arguments.join(" "),
            output.status,
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let last = text.lines().last().unwrap_or("null");
    serde_json::from_str(last)
        .with_context(|| format!("longhaul {} said {last:?}", arguments.join(" ")))
}

/// The first value of that key, wherever it is: how answers are wrapped is the product's affair.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => {
            map.get(key).or_else(|| map.values().find_map(|value| find(value, key)))
        }
        Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}
