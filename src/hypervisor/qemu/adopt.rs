//! Describes a VM that somebody else started, from its monitor and its command line.
//!
//! Invariant: nothing is dropped in silence. What of the machine the description does not have is
//! in [`Adopted::not_understood`]; what only concerned the host it ran on is in [`Adopted::notes`].
//!
//! The command line says which options were chosen, QEMU's object tree where everything ended up:
//! addresses, defaults, and what was added since.

mod board;
mod cmdline;
mod describe;
mod disks;
mod names;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::launch::QemuHandle;
use super::qmp::Qmp;
use super::run::{Process, RunPaths};
use crate::hypervisor::spec::host::HostPolicy;
use crate::hypervisor::{HypervisorError, VmSpec};

/// Most devices whose place is asked for; a VM with more is not described whole, and says so.
const DEVICES_MAX: usize = 512;

/// A VM that somebody else started.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// What it is, as far as it is understood.
    pub spec: VmSpec,
    /// What of it the description lacks, each a sentence. If there is any, a machine made from the
    /// description is another one, and most likely refuses this one's state.
    pub not_understood: Vec<String>,
    /// What the description leaves out because it concerns the host only, or what to know about
    /// it, each a sentence.
    pub notes: Vec<String>,
    /// The hypervisor's process.
    pub process: Process,
}

/// Everything that QEMU tells of itself.
#[derive(Debug, Clone, Default)]
struct Observed {
    words: Vec<String>,
    cwd: PathBuf,
    machine: String,
    cpu: String,
    cpus: Vec<Value>,
    kvm: bool,
    memory_bytes: u64,
    uuid: Option<String>,
    blocks: Vec<Value>,
    devices: Vec<QomDevice>,
    too_many: bool,
}

/// A device in QEMU's object tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct QomDevice {
    path: String,
    /// Its type.
    driver: String,
    origin: Origin,
    /// Slot and function in one number, as `slot * 8 + function`.
    devfn: Option<u8>,
    /// Path of the bus it is on.
    bus: String,
    mac: Option<String>,
    /// Position on its controller, by whichever name it has there.
    unit: Option<u8>,
    port: Option<u8>,
}

/// Where in the tree a device is, which tells who made it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Origin {
    /// Asked for, with an id.
    Named,
    /// Asked for, without one.
    Nameless,
    /// Made by the machine.
    #[default]
    Machine,
}

/// Describes the VM behind `qmp` under the name that the monitor was connected with. Pools and
/// networks of `policy` are recognised and used; what is in none goes by its path, or by a name
/// that says what it is.
///
/// # Errors
///
/// `Unsupported` if its process cannot be found, else as [`Qmp::execute`].
pub async fn adopt(qmp: &Qmp, policy: &HostPolicy) -> Result<Adopted, HypervisorError> {
    let process = process_of(qmp)?;
    let observed = observe(qmp, process).await?;
    let mut adopted = describe::describe(&observed, qmp.vm(), policy, process);
    adopted.spec = match adopted.spec.addressed() {
        Ok(spec) => spec,
        Err(problems) => {
            adopted.not_understood.extend(problems);
            adopted.spec
        }
    };
    Ok(adopted)
}

impl Adopted {
    /// A handle for it; sockets and files of ours go below `run_dir`.
    ///
    /// # Errors
    ///
    /// As [`RunPaths::new`].
    pub fn into_handle(
        self,
        qmp: Qmp,
        qmp_path: &Path,
        run_dir: &Path,
    ) -> Result<QemuHandle, HypervisorError> {
        let mut paths = RunPaths::new(run_dir, qmp.vm())?;
        paths.qmp = qmp_path.to_owned();
        let vm = qmp.vm().to_owned();
        let Self { spec, not_understood, process, .. } = self;
        Ok(QemuHandle { vm, qmp, process, paths, spec, not_understood })
    }
}

/// The process at the other end of the monitor.
fn process_of(qmp: &Qmp) -> Result<Process, HypervisorError> {
    let unsupported = |reason: String| HypervisorError::Unsupported {
        vm: qmp.vm().to_owned(),
        reason: format!("its process cannot be found: {reason}"),
    };
    let pid = qmp.peer_pid().ok_or_else(|| unsupported("the kernel does not tell it".into()))?;
    let process =
        Process::of(pid).ok_or_else(|| unsupported(format!("process {pid} has ended")))?;
    let words = process
        .arguments()
        .map_err(|e| unsupported(format!("the command line of process {pid}: {e}")))?;
    let (program, _) = cmdline::split(&words);
    let base = program.as_deref().and_then(|p| p.rsplit('/').next()).unwrap_or_default();
    if base.contains("qemu") || base == "kvm" {
        return Ok(process);
    }
    Err(unsupported(format!(
        "its monitor was opened by process {pid}, which is {base:?} and not QEMU: a manager that \
         hands sockets down must be asked to move its VMs itself"
    )))
}

fn unexpected(qmp: &Qmp, what: &str) -> HypervisorError {
    HypervisorError::Unexpected {
        vm: qmp.vm().to_owned(),
        detail: format!("{what} is not in its answer"),
    }
}

async fn observe(qmp: &Qmp, process: Process) -> Result<Observed, HypervisorError> {
    let words = process.arguments().map_err(|source| HypervisorError::Io {
        doing: format!("{}: reading the command line of process {}", qmp.vm(), process.pid),
        source,
    })?;
    let get = async |path: &str, property: &str| {
        qmp.execute("qom-get", json!({ "path": path, "property": property })).await
    };
    let machine = get("/machine", "type").await?;
    let machine = machine.as_str().and_then(|m| m.strip_suffix("-machine"));
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    let cpus = cpus.as_array().cloned().unwrap_or_default();
    let first = cpus.first().and_then(|c| c["qom-path"].as_str());
    let cpu = get(first.ok_or_else(|| unexpected(qmp, "a CPU"))?, "type").await?;
    let cpu = cpu.as_str().and_then(|c| c.strip_suffix("-x86_64-cpu"));
    let memory = qmp.execute("query-memory-size-summary", json!({})).await?;
    let uuid = qmp.execute("query-uuid", json!({})).await?;
    let uuid = uuid["UUID"].as_str().filter(|u| u.bytes().any(|b| b != b'0' && b != b'-'));
    let blocks = qmp.execute("query-block", json!({})).await?;
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    let (devices, too_many) = devices(qmp).await?;
    Ok(Observed {
        words,
        cwd: std::fs::read_link(format!("/proc/{}/cwd", process.pid)).unwrap_or_default(),
        machine: machine.ok_or_else(|| unexpected(qmp, "the machine type"))?.to_owned(),
        cpu: cpu.ok_or_else(|| unexpected(qmp, "an x86-64 CPU"))?.to_owned(),
        cpus,
        kvm: kvm["enabled"] == json!(true),
        memory_bytes: memory["base-memory"]
            .as_u64()
            .ok_or_else(|| unexpected(qmp, "the memory's size"))?,
        uuid: uuid.map(ToOwned::to_owned),
        blocks: blocks.as_array().cloned().unwrap_or_default(),
        devices,
        too_many,
    })
}

/// Every device, with its place. Properties that a device does not have are simply none.
async fn devices(qmp: &Qmp) -> Result<(Vec<QomDevice>, bool), HypervisorError> {
    let mut devices = Vec::new();
    for (container, origin) in [
        ("/machine/peripheral", Origin::Named),
        ("/machine/peripheral-anon", Origin::Nameless),
        ("/machine/unattached", Origin::Machine),
    ] {
        let list = qmp.execute("qom-list", json!({ "path": container })).await?;
        let mut found = Vec::new();
        for child in list.as_array().into_iter().flatten() {
            let name = child["name"].as_str().unwrap_or_default();
            let kind = child["type"].as_str().unwrap_or_default();
            let driver = kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>'));
            // Beside devices the machine keeps memory regions and wires there.
            let Some(driver) = driver.filter(|_| origin == Origin::Named || is_numbered(name))
            else {
                continue;
            };
            found.push(QomDevice {
                path: format!("{container}/{name}"),
                driver: driver.to_owned(),
                origin,
                ..QomDevice::default()
            });
        }
        found.sort_by_key(|d| number_in(&d.path));
        devices.extend(found);
    }
    let too_many = devices.len() > DEVICES_MAX;
    devices.truncate(DEVICES_MAX);
    for device in devices.iter_mut().filter(|d| !names::is_chipset(&d.driver)) {
        let get = async |property: &str| {
            let ask = json!({ "path": device.path, "property": property });
            qmp.execute("qom-get", ask).await.ok()
        };
        let bus = get("parent_bus").await;
        let devfn = get("addr").await;
        let mac = get("mac").await;
        let mut unit = None;
        for property in ["scsi-id", "unit", "nr"] {
            if unit.is_none() {
                unit = get(property).await;
            }
        }
        let port = get("port").await;
        let byte = |v: Option<Value>| v.and_then(|v| u8::try_from(v.as_i64()?).ok());
        device.bus = bus.as_ref().and_then(Value::as_str).unwrap_or_default().to_owned();
        device.devfn = byte(devfn);
        device.mac = mac.as_ref().and_then(Value::as_str).map(ToOwned::to_owned);
        device.unit = byte(unit);
        device.port = port.as_ref().and_then(Value::as_str).and_then(|p| p.parse().ok());
    }
    Ok((devices, too_many))
}

fn is_numbered(name: &str) -> bool {
    name.starts_with("device[") && name.ends_with(']')
}

/// The number of a device that has no name: the order in which they were made.
fn number_in(path: &str) -> Option<u64> {
    path.rsplit_once('[')?.1.strip_suffix(']')?.parse().ok()
}
