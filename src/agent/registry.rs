//! The VMs of this host as commands see them: start, stop, adopt, list, show, check.
//!
//! Invariants: QEMU serves one client per monitor, so everybody in this process shares the one
//! connection that [`Registry::handle`] keeps for each VM. What QEMU says is asked each time; only
//! what a VM is comes from the [`Book`].

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::book::{Book, BookError, Entry};
use super::setup::make_dir;
use crate::config::{line_of, valid_name};
use crate::control::{Adopted, Failure, VmDetail, VmSource, VmSummary, chain};
use crate::hypervisor::qemu::adopt::{Adopted as Observed, adopt};
use crate::hypervisor::qemu::args::Role;
use crate::hypervisor::qemu::check::leaving;
use crate::hypervisor::qemu::host::VmBook;
use crate::hypervisor::qemu::launch::{QemuHandle, launch, running_vms};
use crate::hypervisor::qemu::qmp::Qmp;
use crate::hypervisor::spec::host::{HostPolicy, ResolvedVm, resolve_own};
use crate::hypervisor::{HypervisorError, RunState, VmSpec};

/// Time for one VM to say how it is, in a list of all.
const STATE_WAIT: Duration = Duration::from_secs(3);
/// Time for a guest to power off when it is asked to.
const POWER_OFF_WAIT: Duration = Duration::from_secs(120);

/// The connection to one VM's monitor, once somebody has asked for it.
type Line = Arc<tokio::sync::Mutex<Option<QemuHandle>>>;

/// The VMs of this host.
pub struct Registry {
    book: Arc<Book>,
    policy: HostPolicy,
    lines: Mutex<BTreeMap<String, Line>>,
}

impl Registry {
    /// The VMs of `book`, under `policy`.
    pub fn new(book: Arc<Book>, policy: HostPolicy) -> Self {
        Self { book, policy, lines: Mutex::default() }
    }

    /// The book that it works on.
    pub fn book(&self) -> &Arc<Book> {
        &self.book
    }

    /// What this host allows.
    pub fn policy(&self) -> &HostPolicy {
        &self.policy
    }

    /// The running QEMU of one of this host's VMs, over the one connection that there is.
    ///
    /// # Errors
    /// `Unsupported` if this host has no such VM, `Gone` if it does not run.
    pub async fn handle(&self, vm: &str) -> Result<QemuHandle, HypervisorError> {
        let entry = self.book.get(vm).ok_or_else(|| HypervisorError::Unsupported {
            vm: vm.to_owned(),
            reason: "this host has no such VM: `longhaul vm list` shows them".to_owned(),
        })?;
        let line = self.line(vm);
        let mut line = line.lock().await;
        if let Some(handle) = line.as_ref()
            && handle.is_alive()
            && !handle.qmp.is_closed()
        {
            return Ok(handle.clone());
        }
        let handle = match &entry.qmp {
            Some(socket) => {
                let qmp = Qmp::connect(socket, vm).await?;
                let found = adopt(&qmp, &self.policy).await?;
                // What it is was written down when it was adopted, and may have been corrected.
                let found = Observed { spec: entry.vm, ..found };
                self.adopted_handle(found, qmp, socket)?
            }
            None => {
                let running = running_vms(&self.policy.run_dir);
                let found = running.into_iter().find(|running| running.record.spec.name == vm);
                let gone = || HypervisorError::Gone {
                    vm: vm.to_owned(),
                    detail: "it does not run".to_owned(),
                };
                found.ok_or_else(gone)?.attach().await?
            }
        };
        *line = Some(handle.clone());
        Ok(handle)
    }

    /// Whether somebody is just starting it, adopting it or calling its monitor.
    pub(crate) fn is_busy(&self, vm: &str) -> bool {
        self.line(vm).try_lock().is_err()
    }

    /// Whether this host has such a VM.
    pub(crate) fn knows(&self, vm: &str) -> bool {
        self.book.get(vm).is_some()
    }

    pub(crate) async fn start(&self, source: VmSource) -> Result<String, Failure> {
        let spec = self.spec(&source)?;
        let name = spec.name.clone();
        let known = self.book.get(&name);
        if known.is_some() && self.handle(&name).await.is_ok() {
            return Err(Failure::refused(
                format!("{name} runs already"),
                format!("`longhaul vm show {name}` describes it"),
            ));
        }
        let resolved = self.resolved(&spec)?;
        self.refuse_left_overs(&resolved)?;
        // Its monitor takes one client at a time: nobody else calls before it has answered us.
        let line = self.line(&name);
        let mut line = line.lock().await;
        // In the book first: a crash in between leaves a VM that does not run, never one that runs
        // and that nobody knows.
        let entry = Entry { qmp: None, vm: resolved.spec.clone() };
        self.book.add(entry).map_err(|error| book_failure(&name, &error))?;
        match launch(&resolved, Role::Fresh, &self.policy.run_dir).await {
            Ok(handle) => {
                tracing::info!(vm = name, pid = handle.process.pid, "VM started");
                *line = Some(handle);
                Ok(format!("{name} runs"))
            }
            Err(error) => {
                let undone = match known {
                    Some(before) => self.book.add(before),
                    None => self.book.forget(&name),
                };
                if let Err(error) = undone {
                    tracing::error!(vm = name, error = chain(&error), "the book was not put back");
                }
                let state = format!("{name} does not run");
                Err(Failure::failed(chain(&error), state, "correct its description or this host"))
            }
        }
    }

    pub(crate) async fn list(self: &Arc<Self>) -> Vec<VmSummary> {
        let mut asked = JoinSet::new();
        for entry in self.book.all() {
            let registry = Arc::clone(self);
            asked.spawn(async move { registry.summary(&entry).await });
        }
        let mut summaries = asked.join_all().await;
        summaries.sort_by(|a, b| a.name.cmp(&b.name));
        summaries
    }

    pub(crate) async fn show(&self, vm: &str) -> Result<VmDetail, Failure> {
        let entry = self.entry(vm)?;
        let description = toml::to_string(&entry.vm)
            .map_err(|error| Failure::failed(format!("cannot print {vm}: {error}"), "", ""))?;
        let summary = self.summary(&entry).await;
        let qmp = match (&entry.qmp, self.handle(vm).await) {
            (Some(qmp), _) => Some(qmp.display().to_string()),
            (None, Ok(handle)) => Some(handle.paths.qmp.display().to_string()),
            (None, Err(_)) => None,
        };
        Ok(VmDetail { summary, qmp, description })
    }

    pub(crate) async fn stop(&self, vm: &str, force: bool) -> Result<String, Failure> {
        self.entry(vm)?;
        let handle = match self.handle(vm).await {
            Ok(handle) => handle,
            Err(HypervisorError::Gone { .. }) => {
                return Err(Failure::refused(format!("{vm} does not run"), ""));
            }
            Err(error) => return Err(hypervisor_failure(vm, &error)),
        };
        if force {
            handle.quit().await.map_err(|error| hypervisor_failure(vm, &error))?;
            tracing::info!(vm, "VM ended by force");
            return Ok(format!("{vm} is ended"));
        }
        let asked = handle.qmp.execute("system_powerdown", json!({})).await;
        asked.map_err(|error| hypervisor_failure(vm, &error))?;
        let ended = handle.process.wait_end(POWER_OFF_WAIT).await;
        if !ended {
            return Err(Failure::failed(
                format!("{vm} was asked to power off and has not, {POWER_OFF_WAIT:?} later"),
                format!("{vm} still runs; it may power off yet"),
                format!("ask inside the guest, or `longhaul vm stop {vm} --force`"),
            ));
        }
        tracing::info!(vm, "VM powered off");
        Ok(format!("{vm} is powered off"))
    }

    pub(crate) async fn adopt(
        &self,
        socket: &Path,
        name: Option<String>,
    ) -> Result<Adopted, Failure> {
        let name = name.or_else(|| socket.file_stem()?.to_str().map(str::to_owned));
        let vm = name.unwrap_or_default();
        valid_name(&vm).map_err(|problem| Failure::refused(problem.what, "name it with --name"))?;
        if self.book.get(&vm).is_some_and(|known| known.qmp.as_deref() != Some(socket)) {
            let what = format!("there is a VM called {vm} here already");
            return Err(Failure::refused(what, "give it another name with --name"));
        }
        let line = self.line(&vm);
        let mut line = line.lock().await;
        // Its monitor serves one client: ours, if it was adopted before.
        *line = None;
        let refused = |error: HypervisorError| {
            let next = "is this the QMP socket of a running QEMU, and is nobody else connected?";
            Failure::refused(chain(&error), next)
        };
        let qmp = Qmp::connect(socket, &vm).await.map_err(refused)?;
        let found = adopt(&qmp, &self.policy).await.map_err(refused)?;
        let not_understood = found.not_understood.clone();
        let notes = found.notes.clone();
        let handle = self.adopted_handle(found, qmp, socket).map_err(refused)?;
        let entry = Entry { qmp: Some(socket.to_owned()), vm: handle.spec.clone() };
        self.book.add(entry).map_err(|error| book_failure(&vm, &error))?;
        *line = Some(handle);
        tracing::info!(vm, qmp = %socket.display(), "VM adopted");
        let file = self.book.file(&vm).display().to_string();
        Ok(Adopted { vm, file, not_understood, notes })
    }

    /// Takes a VM out of the book; its process and its images are left alone.
    pub(crate) async fn forget(&self, vm: &str) -> Result<String, Failure> {
        let entry = self.entry(vm)?;
        if entry.qmp.is_none() && self.handle(vm).await.is_ok() {
            let what = format!("{vm} runs, started by longhaul");
            return Err(Failure::refused(what, format!("`longhaul vm stop {vm}` first")));
        }
        self.book.forget(vm).map_err(|error| book_failure(vm, &error))?;
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        Ok(format!("{vm} is forgotten; its process and images were left alone"))
    }

    /// A VM and why it cannot start here, or, if it is to move, why it cannot leave.
    pub(crate) async fn check(
        &self,
        source: VmSource,
        moving: bool,
    ) -> Result<(VmSpec, Vec<String>), Failure> {
        let spec = self.spec(&source)?;
        if let Err(obstacles) = resolve_own(&spec, &self.policy) {
            return Ok((spec, obstacles));
        }
        if !moving {
            return Ok((spec, Vec::new()));
        }
        let mut obstacles = spec.to_wire().err().unwrap_or_default();
        // A description of a VM that does not run can still be judged at the peer.
        if let Ok(handle) = self.handle(&spec.name).await {
            let leaving = leaving(&handle.qmp).await;
            obstacles.extend(leaving.map_err(|error| hypervisor_failure(&spec.name, &error))?);
        }
        Ok((spec, obstacles))
    }

    /// A handle for a VM that somebody else started, with a folder for sockets of ours.
    fn adopted_handle(
        &self,
        found: Observed,
        qmp: Qmp,
        socket: &Path,
    ) -> Result<QemuHandle, HypervisorError> {
        let handle = found.into_handle(qmp, socket, &self.policy.run_dir)?;
        make_dir(&handle.paths.dir).map_err(|source| HypervisorError::Io {
            doing: format!("{}: making {}", handle.vm, handle.paths.dir.display()),
            source,
        })?;
        Ok(handle)
    }

    fn line(&self, vm: &str) -> Line {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(lines.entry(vm.to_owned()).or_default())
    }

    fn entry(&self, vm: &str) -> Result<Entry, Failure> {
        self.book.get(vm).ok_or_else(|| {
            let what = format!("no VM of this host is called `{vm}`");
            Failure::refused(what, "`longhaul vm list` shows them")
        })
    }

    /// The name of the VM that is meant.
    pub(crate) fn name_of(&self, source: &VmSource) -> Result<String, Failure> {
        self.spec(source).map(|spec| spec.name)
    }

    fn spec(&self, source: &VmSource) -> Result<VmSpec, Failure> {
        let (origin, text) = match source {
            VmSource::Name(vm) => return self.entry(vm).map(|entry| entry.vm),
            VmSource::Description { origin, text } => (origin, text),
        };
        let next = "correct the description; `longhaul vm show NAME` prints one that works";
        let spec: VmSpec = toml::from_str(text).map_err(|error| {
            let line = line_of(text, error.span().map_or(0, |span| span.start));
            let problem = error.message().trim().replace('\n', ", ");
            Failure::refused(format!("{origin}:{line}: {problem}"), next)
        })?;
        match spec.validate() {
            Ok(()) => Ok(spec),
            Err(problems) => {
                Err(Failure::refused(format!("{origin}: {}", problems.join("; ")), next))
            }
        }
    }

    fn resolved(&self, spec: &VmSpec) -> Result<ResolvedVm, Failure> {
        resolve_own(spec, &self.policy).map_err(|problems| {
            let what = format!("{} cannot run here: {}", spec.name, problems.join("; "));
            Failure::refused(what, "correct its description or this host's configuration")
        })
    }

    /// The one way in which an operator could make a VM run twice: starting what it left behind.
    fn refuse_left_overs(&self, resolved: &ResolvedVm) -> Result<(), Failure> {
        for disk in &resolved.disks {
            if let Some((vm, record)) = self.book.departed_owner(&disk.path) {
                let image = disk.path.display();
                return Err(Failure::refused(
                    format!("{vm} has moved to another host, and {image} is what it left here"),
                    format!(
                        "start it where it is; if its image here is to live a life of its own, \
                         remove {} and restart the agent",
                        record.display()
                    ),
                ));
            }
        }
        Ok(())
    }

    async fn summary(&self, entry: &Entry) -> VmSummary {
        let state = async { self.handle(&entry.vm.name).await?.run_state().await };
        let state = match timeout(STATE_WAIT, state).await {
            Ok(Ok(state)) => state_text(state).to_owned(),
            Ok(Err(HypervisorError::Gone { .. })) => "not running".to_owned(),
            Ok(Err(error)) => format!("unknown: {}", chain(&error)),
            Err(_) => "unknown: its monitor does not answer".to_owned(),
        };
        VmSummary {
            name: entry.vm.name.clone(),
            state,
            memory_bytes: entry.vm.memory_mib.saturating_mul(1 << 20),
            cpus: entry.vm.vcpus,
            disks: u32::try_from(entry.vm.disks.len()).unwrap_or(u32::MAX),
            adopted: entry.qmp.is_some(),
        }
    }
}

#[async_trait]
impl VmBook for Registry {
    fn get(&self, vm: &str) -> Option<VmSpec> {
        self.book.get(vm).map(|entry| entry.vm)
    }

    fn runs(&self, vm: &str) -> bool {
        match self.book.get(vm) {
            None => false,
            // Its process is not known; its monitor ends with it.
            Some(Entry { qmp: Some(path), .. }) => UnixStream::connect(path).is_ok(),
            Some(_) => {
                let mut running = running_vms(&self.policy.run_dir).into_iter();
                running.any(|running| running.record.spec.name == vm)
            }
        }
    }

    async fn handle(&self, vm: &str) -> Result<QemuHandle, HypervisorError> {
        Self::handle(self, vm).await
    }

    async fn arrived(&self, vm: &VmSpec, handle: Option<QemuHandle>) -> Result<(), String> {
        let entry = Entry { qmp: None, vm: vm.clone() };
        self.book.add(entry).map_err(|error| chain(&error))?;
        *self.line(&vm.name).lock().await = handle;
        Ok(())
    }

    async fn departed(&self, vm: &str) -> Result<(), String> {
        self.book.depart(vm).map_err(|error| chain(&error))?;
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        Ok(())
    }

    async fn reclaim(&self, vm: &str) -> Result<(), String> {
        self.book.reclaim(vm).map_err(|error| chain(&error))
    }

    fn left_behind(&self, vm: &str, image: &Path) -> bool {
        self.book.left_behind(vm, image)
    }
}

fn state_text(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Parked => "parked",
        RunState::Incoming => "incoming",
        RunState::Stopped => "stopped",
    }
}

fn book_failure(vm: &str, error: &BookError) -> Failure {
    Failure::failed(chain(error), format!("{vm} is as it was"), "is the disk full or read-only?")
}

fn hypervisor_failure(vm: &str, error: &HypervisorError) -> Failure {
    Failure::failed(chain(error), "", format!("`longhaul vm show {vm}` tells how it is now"))
}
