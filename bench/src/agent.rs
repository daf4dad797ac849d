//! One Longhaul agent in one namespace of a WAN, driven by the command line as an operator would.
//!
//! Invariant: the agent, and every VM that it knows, ends with the value that started it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::host::{BINARY_VARIABLE, POOL};
use crate::netns::Side;
use crate::wan::Wan;

/// The environment's name for the folder of points at which an agent of a test build stops, and that
/// folder within the agent's.
const POINTS_VARIABLE: &str = "LONGHAUL_POINTS";
pub(crate) const POINTS: &str = "points";
/// How `longhaul status` ends if a hand-over is not settled.
const EXIT_IN_DOUBT: i32 = 3;
/// How long an agent may take to answer after its start, and to end.
const AGENT_WAIT: Duration = Duration::from_secs(30);
pub(crate) const POLL_PERIOD: Duration = Duration::from_millis(50);

/// A running agent.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Where it is.
    pub(crate) place: Place,
    /// Everything of its own lies below it.
    pub(crate) folder: PathBuf,
    pub(crate) child: Child,
}

/// Where an agent is, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) side: Side,
    /// Its UDP port: several agents of one side differ in it.
    pub(crate) port: u16,
    pub(crate) name: String,
}

impl Place {
    /// Where others reach it.
    pub(crate) fn address(&self) -> String {
        format!("{}:{}", self.side.address(), self.port)
    }
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

impl Agent {
    /// Whether it ends in time when it is asked to.
    pub(crate) fn terminate(&mut self) -> Result<bool> {
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

impl Agent {
    /// Ends it as a crash would, without a word. VMs run on.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill().context("while killing an agent")?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again, on what it left.
    pub(crate) fn restart(&mut self, wan: &Wan, program: &Path) -> Result<()> {
        self.child = spawn(wan, program, self.place.side, &self.folder)?;
        wait_answer(program, &self.folder, &mut self.child)
    }

    /// Starts the VM of this description; `file` is what the description is called in its folder.
    pub(crate) fn start_vm(&self, program: &Path, description: &Value, file: &str) -> Result<()> {
        let file = self.folder.join(file);
        std::fs::write(&file, toml::to_string(description)?)
            .with_context(|| format!("while writing {}", file.display()))?;
        let file = file.to_str().context("the scratch folder's name is not UTF-8")?;
        ask(program, &self.folder, &["vm", "start", file]).map(|_| ())
    }
}

/// Has each agent trust every other, under the name that it has.
pub(crate) fn pair_all(program: &Path, agents: &[Agent]) -> Result<()> {
    for other in agents {
        let Place { name, .. } = &other.place;
        let identity = ask(program, &other.folder, &["pair"])?;
        let fingerprint = find(&identity, "fingerprint").and_then(Value::as_str);
        let fingerprint = fingerprint
            .with_context(|| format!("the agent {name} shows no fingerprint: {identity}"))?;
        for agent in agents.iter().filter(|agent| agent.place != other.place) {
            let address = other.place.address();
            ask(program, &agent.folder, &["pair", name, &address, fingerprint])?;
        }
    }
    Ok(())
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Guests do not end with their agent: these do, they are the harness's own.
        if let Ok(program) = longhaul_binary() {
            let vms = ask(&program, &self.folder, &["vm", "list"]).unwrap_or_default();
            for vm in vms.as_array().into_iter().flatten().filter_map(|vm| vm["name"].as_str()) {
                let _ = ask(&program, &self.folder, &["vm", "stop", vm, "--force"]);
            }
        }
        if matches!(self.terminate(), Ok(true)) {
            return;
        }
        eprintln!("lab: the agent {} did not end by itself", self.place.name);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sets a host up in `folder` and starts its agent; `qemu` is a folder that `bench/setup/qemu` printed.
/// `more` may change the configuration before.
pub(crate) fn start(
    wan: &Wan,
    program: &Path,
    place: Place,
    folder: &Path,
    (qemu, accel): (&Path, &str),
    more: impl FnOnce(&mut toml::Table),
) -> Result<Agent> {
    let output = Command::new(program)
        .args(["init", "--name", &place.name])
        .args(["--listen", &place.address(), "--dir"])
        .arg(folder)
        .output()
        .with_context(|| format!("while running {}", program.display()))?;
    ensure!(
        output.status.success(),
        "longhaul init failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    configure(&config(folder), folder, qemu, accel, more)?;
    let child = spawn(wan, program, place.side, folder)?;
    let mut agent = Agent { place, folder: folder.to_owned(), child };
    wait_answer(program, folder, &mut agent.child)?;
    Ok(agent)
}

pub(crate) fn config(folder: &Path) -> PathBuf {
    folder.join("agent.toml")
}

pub(crate) fn images(folder: &Path) -> PathBuf {
    folder.join("images")
}

/// Names the lab's QEMU and a pool in the configuration that `init` wrote.
fn configure(
    file: &Path,
    folder: &Path,
    qemu: &Path,
    accel: &str,
    more: impl FnOnce(&mut toml::Table),
) -> Result<()> {
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
    more(&mut config);
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

pub(crate) fn ask(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Value> {
    let output = run(program, folder, arguments)?;
    parse(&output, arguments, output.status.success())
}

pub(crate) fn status(program: &Path, folder: &Path) -> Result<Value> {
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
pub(crate) fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => {
            map.get(key).or_else(|| map.values().find_map(|value| find(value, key)))
        }
        Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}
