//! Starts QEMU, finds it again, ends it.
//!
//! Invariant: a started QEMU outlives the agent (it has a process group of its own and no
//! descriptor of ours), and its folder tells a later agent what it is before it runs: the record is
//! written first, the process id by QEMU itself. Every end is observed, never assumed.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::args::{Role, arguments};
use super::memory::is_given_back;
use super::qmp::Qmp;
use super::run::{Process, RunPaths};
use crate::hypervisor::spec::FirmwareSpec;
use crate::hypervisor::spec::host::ResolvedVm;
use crate::hypervisor::{HypervisorError, RunState, VmSpec};

/// How long QEMU may take from its start to its monitor. It allocates memory and opens images.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a starting QEMU is looked at.
const START_POLL: Duration = Duration::from_millis(20);
/// How long QEMU may take to end when asked: it flushes its disks.
pub const QUIT_LIMIT: Duration = Duration::from_secs(60);
/// How long the kernel may take to end a killed process.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How much of QEMU's messages an error quotes, from their end.
const WORDS_BYTES_MAX: usize = 2000;
/// Most folders that are looked at for running VMs.
const RUNNING_MAX: usize = 4096;
/// Longest record that is read back.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// A QEMU that runs: one that we started or one that we found.
#[derive(Debug, Clone)]
pub struct QemuHandle {
    /// The VM's name.
    pub vm: String,
    /// Its monitor.
    pub qmp: Qmp,
    /// Its process.
    pub process: Process,
    /// Its files. Of one that somebody else started, only the monitor's path is known to exist.
    pub paths: RunPaths,
    /// What it is.
    pub spec: VmSpec,
    /// What of one that somebody else started the description lacks, each a sentence.
    pub not_understood: Vec<String>,
}

/// What is written down about a QEMU before it is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// What it is.
    pub spec: VmSpec,
    /// Where its images lie, in the order of its disks.
    pub images: Vec<PathBuf>,
    /// Whether it was started to wait for a guest.
    pub incoming: bool,
}

/// A QEMU of ours that runs, as its folder tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningVm {
    /// What was written down at its start.
    pub record: RunRecord,
    /// Its process.
    pub process: Process,
    /// Its files.
    pub paths: RunPaths,
}

fn io_error(doing: String) -> impl FnOnce(io::Error) -> HypervisorError {
    |source| HypervisorError::Io { doing, source }
}

/// Starts QEMU for `vm` and returns once its monitor answers. With [`Role::Fresh`] the guest runs
/// then, with [`Role::Incoming`] nothing does.
///
/// # Errors
///
/// `Unsupported` if QEMU refuses the VM, with QEMU's own words, or if it runs already; `Io` if its
/// folder cannot be made. Nothing of a failed start stays, but a flash file made for it.
pub async fn launch(
    vm: &ResolvedVm,
    role: Role,
    run_dir: &Path,
) -> Result<QemuHandle, HypervisorError> {
    let name = vm.spec.name.clone();
    let unsupported = |reason| HypervisorError::Unsupported { vm: name.clone(), reason };
    let paths = RunPaths::new(run_dir, &name)?;
    if let Some(running) = running_in(&paths) {
        return Err(unsupported(format!(
            "it runs on this host already, as process {}",
            running.process.pid
        )));
    }
    if role == Role::Fresh && vm.spec.kernel.is_some() && vm.kernel.is_none() {
        return Err(unsupported("its kernel or initrd is not there".to_owned()));
    }
    prepare_dir(&paths, vm, role)?;
    if role == Role::Incoming {
        prepare_flash(vm)?;
    }
    let started = start(vm, role, &paths).await;
    match started {
        Ok((process, qmp)) => Ok(QemuHandle {
            vm: name,
            qmp,
            process,
            paths,
            spec: vm.spec.clone(),
            not_understood: Vec::new(),
        }),
        Err(e) => {
            remove_dir(&paths);
            Err(e)
        }
    }
}

async fn start(
    vm: &ResolvedVm,
    role: Role,
    paths: &RunPaths,
) -> Result<(Process, Qmp), HypervisorError> {
    let name = &vm.spec.name;
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&paths.log)
        .map_err(io_error(format!("{name}: opening {}", paths.log.display())))?;
    let log_too =
        log.try_clone().map_err(io_error(format!("{name}: opening {}", paths.log.display())))?;
    let mut child = Command::new(&vm.qemu)
        .args(arguments(vm, role, paths))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        // Its own group: what ends the agent's group (a closed terminal, Ctrl-C) is not for it.
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
        .map_err(io_error(format!("{name}: starting {}", vm.qemu.display())))?;
    match wait_for_monitor(&mut child, name, paths).await {
        Ok(started) => Ok(started),
        Err(e) => {
            // It may be half-way up: nothing may stay.
            if let Err(e) = child.kill().await {
                tracing::warn!(vm = name, error = %e, "a failed start cannot be ended");
            }
            Err(e)
        }
    }
    // From here on nobody waits for the child: the runtime notices its end and clears it away.
}

async fn wait_for_monitor(
    child: &mut Child,
    name: &str,
    paths: &RunPaths,
) -> Result<(Process, Qmp), HypervisorError> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let ended = child.try_wait().map_err(io_error(format!("{name}: watching its start")))?;
        if let Some(status) = ended {
            let words = last_words(&paths.log);
            return Err(HypervisorError::Unsupported {
                vm: name.to_owned(),
                reason: format!("QEMU did not start ({status}): {words}"),
            });
        }
        match Qmp::connect(&paths.qmp, name).await {
            Ok(qmp) => {
                let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
                let process = pid.and_then(Process::of);
                let process = process.ok_or_else(|| HypervisorError::Gone {
                    vm: name.to_owned(),
                    detail: format!("it ended while it started: {}", last_words(&paths.log)),
                })?;
                return Ok((process, qmp));
            }
            Err(HypervisorError::Gone { .. }) if Instant::now() < deadline => {
                sleep(START_POLL).await;
            }
            Err(e) => return Err(e),
        }
    }
}

/// The end of QEMU's messages, on one line.
fn last_words(log: &Path) -> String {
    let Ok(bytes) = fs::read(log) else { return "it left no message".to_owned() };
    let tail = &bytes[bytes.len().saturating_sub(WORDS_BYTES_MAX)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "it left no message".to_owned() } else { lines.join("; ") }
}

fn prepare_dir(paths: &RunPaths, vm: &ResolvedVm, role: Role) -> Result<(), HypervisorError> {
    let name = &vm.spec.name;
    remove_dir(paths);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&paths.dir)
        .map_err(io_error(format!("{name}: making its run folder {}", paths.dir.display())))?;
    let record = RunRecord {
        spec: vm.spec.clone(),
        images: vm.disks.iter().map(|d| d.path.clone()).collect(),
        incoming: role == Role::Incoming,
    };
    let bytes = serde_json::to_vec(&record).map_err(|e| HypervisorError::Unexpected {
        vm: name.clone(),
        detail: format!("its description cannot be written: {e}"),
    })?;
    fs::write(&paths.record, bytes)
        .map_err(io_error(format!("{name}: writing {}", paths.record.display())))
}

/// An arriving guest brings the content of its flash in its memory, and QEMU writes it to the file
/// when the guest runs: the file only has to be there and of the right size.
fn prepare_flash(vm: &ResolvedVm) -> Result<(), HypervisorError> {
    let (FirmwareSpec::Uefi { vars_bytes, .. }, Some((_, vars))) = (&vm.spec.firmware, &vm.flash)
    else {
        return Ok(());
    };
    let name = &vm.spec.name;
    let file = match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(vars) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        file => file.map_err(io_error(format!("{name}: making {}", vars.display())))?,
    };
    file.set_len(*vars_bytes).map_err(io_error(format!("{name}: sizing {}", vars.display())))
}

/// Removes the VM's run folder; that it cannot be is only worth a warning.
fn remove_dir(paths: &RunPaths) {
    match fs::remove_dir_all(&paths.dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %paths.dir.display(), error = %e, "run folder stays");
        }
        _ => {}
    }
}

/// The QEMU that runs in this folder.
fn running_in(paths: &RunPaths) -> Option<RunningVm> {
    let pid: i32 = fs::read_to_string(&paths.pid).ok()?.trim().parse().ok()?;
    let process = Process::of(pid)?;
    // The id may be somebody else's by now: only our own QEMU was told this folder's id file.
    let file = paths.pid.to_str()?;
    process.arguments().ok()?.iter().any(|argument| argument == file).then_some(())?;
    if fs::metadata(&paths.record).ok()?.len() > RECORD_BYTES_MAX {
        return None;
    }
    let record = serde_json::from_slice(&fs::read(&paths.record).ok()?).ok()?;
    Some(RunningVm { record, process, paths: paths.clone() })
}

/// Every QEMU of ours that runs, by the folders below `run_dir`.
pub fn running_vms(run_dir: &Path) -> Vec<RunningVm> {
    let Ok(dirs) = fs::read_dir(run_dir) else { return Vec::new() };
    dirs.take(RUNNING_MAX)
        .filter_map(|dir| {
            let name = dir.ok()?.file_name().into_string().ok()?;
            running_in(&RunPaths::new(run_dir, &name).ok()?)
        })
        .collect()
}

impl RunningVm {
    /// Connects to its monitor.
    ///
    /// # Errors
    ///
    /// As [`Qmp::connect`].
    pub async fn attach(self) -> Result<QemuHandle, HypervisorError> {
        let vm = self.record.spec.name.clone();
        let qmp = Qmp::connect(&self.paths.qmp, &vm).await?;
        Ok(QemuHandle {
            vm,
            qmp,
            process: self.process,
            paths: self.paths,
            spec: self.record.spec,
            not_understood: Vec::new(),
        })
    }
}

impl QemuHandle {
    /// Whether its process runs.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Whether the guest's CPUs run, by QEMU's word. QEMU calls a paused VM migrated for as long as
    /// it stays paused, whatever became of the migration: parked is only one that may run elsewhere.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub async fn run_state(&self) -> Result<RunState, HypervisorError> {
        let status = self.qmp.execute("query-status", json!({})).await?;
        match run_state_of(status["status"].as_str().unwrap_or_default()) {
            RunState::Parked if is_given_back(&self.qmp).await? => Ok(RunState::Paused),
            state => Ok(state),
        }
    }

    /// The end of QEMU's messages, for errors.
    pub fn last_words(&self) -> String {
        last_words(&self.paths.log)
    }

    /// Asks QEMU to end, which flushes its disks, and waits for it. If it does not, it is killed.
    /// Removes its folder if it was started by us.
    ///
    /// # Errors
    ///
    /// `Io` if it cannot be ended or the kernel says no.
    pub async fn quit(&self) -> Result<(), HypervisorError> {
        // It closes the socket, perhaps before it answers: what counts is that it ends.
        if let Err(e) = self.qmp.execute("quit", Value::Null).await {
            tracing::debug!(vm = self.vm, error = %e, "quit got no answer");
        }
        if self.process.wait_end(QUIT_LIMIT).await {
            self.forget();
            return Ok(());
        }
        tracing::warn!(vm = self.vm, pid = self.process.pid, "QEMU does not quit: killed");
        self.kill().await
    }

    /// Ends the process at once; what its disks had not yet written is lost.
    ///
    /// # Errors
    ///
    /// `Io` if the kernel says no, or it still runs afterwards.
    pub async fn kill(&self) -> Result<(), HypervisorError> {
        let doing = || format!("{}: killing process {}", self.vm, self.process.pid);
        self.process.signal(Signal::KILL).map_err(io_error(doing()))?;
        if !self.process.wait_end(KILL_LIMIT).await {
            let stuck = io::Error::new(io::ErrorKind::TimedOut, "it still runs");
            return Err(io_error(doing())(stuck));
        }
        self.forget();
        Ok(())
    }

    /// Removes the folder of an ended QEMU, if there is one.
    fn forget(&self) {
        if self.paths.record.exists() {
            remove_dir(&self.paths);
        }
    }
}

/// What QEMU's word for its state means.
pub fn run_state_of(status: &str) -> RunState {
    match status {
        "running" => RunState::Running,
        "postmigrate" => RunState::Parked,
        "inmigrate" => RunState::Incoming,
        // `finish-migrate` is the short time before `postmigrate`, or a failed attempt's end.
        "paused" | "prelaunch" | "finish-migrate" | "suspended" | "save-vm" | "restore-vm"
        | "debug" => RunState::Paused,
        _ => RunState::Stopped,
    }
}
