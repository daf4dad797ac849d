//! What would keep a VM from leaving or from arriving, found before anything is sent.
//!
//! Invariant: every reason is a sentence that an operator can act upon, and nothing is changed by
//! asking.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::json;

use super::launch::running_vms;
use super::memory::is_given_back;
use super::probe::QemuFacts;
use super::qmp::Qmp;
use crate::hypervisor::spec::host::{HostPolicy, ResolvedVm, resolve};
use crate::hypervisor::{HypervisorError, VmSpec};

/// The oldest QEMU whose stream and commands are known.
pub const OLDEST_QEMU: (u32, u32) = (7, 2);
/// Memory that a VM's QEMU takes besides its guest's, in MiB.
const OVERHEAD_MIB: u64 = 128;

/// Reasons why the VM behind `qmp` cannot leave now; empty if it can.
///
/// # Errors
///
/// As [`Qmp::execute`].
pub async fn leaving(qmp: &Qmp) -> Result<Vec<String>, HypervisorError> {
    let mut reasons = version_reasons(qmp.version());
    let migration = qmp.execute("query-migrate", json!({})).await?;
    for blocker in migration["blocked-reasons"].as_array().into_iter().flatten() {
        let words = blocker.as_str().unwrap_or("it does not say what");
        reasons.push(format!("QEMU refuses to migrate it: {words}"));
    }
    if let Some(status) = migration["status"].as_str()
        && ["setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling"]
            .contains(&status)
    {
        reasons.push(format!("a migration is under way already ({status})"));
    }
    let status = qmp.execute("query-status", json!({})).await?;
    match status["status"].as_str().unwrap_or_default() {
        "running" | "paused" | "prelaunch" => {}
        "postmigrate" if is_given_back(qmp).await? => reasons.push(
            "it is paused since an earlier attempt to move it, and QEMU moves it again only after \
             it has run: resume it first"
                .to_owned(),
        ),
        "postmigrate" => reasons.push(
            "it has been migrated already and is parked: roll that back or end it first".into(),
        ),
        "inmigrate" => reasons.push("it waits for a guest that arrives".to_owned()),
        other => reasons.push(format!("its state is {other}: it must run or be paused")),
    }
    let jobs = qmp.execute("query-block-jobs", json!({})).await?;
    for job in jobs.as_array().into_iter().flatten() {
        reasons.push(format!(
            "block job {} ({}) works on its disks: let it end or cancel it",
            job["device"].as_str().unwrap_or("without a name"),
            job["type"].as_str().unwrap_or("unknown")
        ));
    }
    Ok(reasons)
}

fn version_reasons((major, minor, _): (u32, u32, u32)) -> Vec<String> {
    if (major, minor) >= OLDEST_QEMU {
        return Vec::new();
    }
    let (oldest_major, oldest_minor) = OLDEST_QEMU;
    vec![format!("QEMU {major}.{minor} is too old: {oldest_major}.{oldest_minor} is needed")]
}

/// Reasons why this host cannot have the VM; empty if it can. `disk_bytes` are the sizes of its
/// disks as the guest sees them, in their order.
pub fn can_host(
    spec: &VmSpec,
    policy: &HostPolicy,
    facts: &QemuFacts,
    disk_bytes: &[u64],
) -> Vec<String> {
    let vm = match resolve(spec, policy) {
        Ok(vm) => vm,
        Err(reasons) => return reasons,
    };
    let mut reasons = version_reasons(facts.version);
    reasons.extend(qemu_reasons(&vm.spec, facts));
    reasons.extend(memory_reasons(&vm.spec, available_mib()));
    reasons.extend(disk_reasons(&vm, disk_bytes));
    reasons.extend(neighbour_reasons(&vm, policy));
    reasons
}

/// What this QEMU lacks.
fn qemu_reasons(spec: &VmSpec, facts: &QemuFacts) -> Vec<String> {
    let mut reasons = Vec::new();
    let (major, minor, _) = facts.version;
    match facts.machine(&spec.machine) {
        None => {
            let newest = facts.newest_like(&spec.machine).unwrap_or("of another family");
            reasons.push(format!(
                "QEMU {major}.{minor} here has no machine type {}; its newest is {newest}",
                spec.machine
            ));
        }
        Some(machine) if spec.vcpus > machine.cpu_max => reasons.push(format!(
            "machine type {} has at most {} virtual CPUs here, the VM has {}",
            spec.machine, machine.cpu_max, spec.vcpus
        )),
        Some(_) => {}
    }
    if !facts.cpu_models.contains(&spec.cpu.model) {
        reasons.push(format!("QEMU {major}.{minor} here has no CPU model {}", spec.cpu.model));
    }
    reasons
}

/// Memory that could be given to a new VM, in MiB, if the kernel tells.
fn available_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

fn memory_reasons(spec: &VmSpec, available: Option<u64>) -> Vec<String> {
    let needed = spec.memory_mib.saturating_add(OVERHEAD_MIB);
    match available {
        Some(available) if available < needed => vec![format!(
            "it needs {needed} MiB of memory with QEMU's own, and {available} MiB are available \
             here"
        )],
        _ => Vec::new(),
    }
}

fn disk_reasons(vm: &ResolvedVm, disk_bytes: &[u64]) -> Vec<String> {
    if disk_bytes.len() != vm.disks.len() {
        return vec![format!(
            "its description has {} disks and sizes came for {}",
            vm.disks.len(),
            disk_bytes.len()
        )];
    }
    let mut reasons = Vec::new();
    // Disks in one folder share its space.
    let mut folders: Vec<(&Path, u64)> = Vec::new();
    for (disk, &bytes) in vm.disks.iter().zip(disk_bytes) {
        let Some(folder) = disk.path.parent() else { continue };
        let here = match fs::metadata(&disk.path) {
            Ok(meta) => std::os::unix::fs::MetadataExt::blocks(&meta).saturating_mul(512),
            Err(e) if e.kind() == ErrorKind::NotFound => 0,
            Err(e) => {
                reasons.push(format!("{} cannot be looked at: {e}", disk.path.display()));
                continue;
            }
        };
        let more = bytes.saturating_sub(here);
        match folders.iter_mut().find(|(f, _)| *f == folder) {
            Some((_, sum)) => *sum = sum.saturating_add(more),
            None => folders.push((folder, more)),
        }
    }
    for (folder, needed) in folders {
        match rustix::fs::statvfs(folder) {
            Ok(space) => {
                let free = space.f_bavail.saturating_mul(space.f_frsize);
                if free < needed {
                    reasons.push(format!(
                        "its disks may grow by {} MiB in {}, where {} MiB are free",
                        needed >> 20,
                        folder.display(),
                        free >> 20
                    ));
                }
            }
            Err(e) => reasons.push(format!("{} cannot be used: {e}", folder.display())),
        }
    }
    reasons
}

/// What VMs of ours that run here already have.
fn neighbour_reasons(vm: &ResolvedVm, policy: &HostPolicy) -> Vec<String> {
    let macs: BTreeSet<_> = vm.spec.nics.iter().map(|n| n.mac.to_ascii_lowercase()).collect();
    let mut reasons = Vec::new();
    for other in running_vms(&policy.run_dir) {
        let spec = &other.record.spec;
        if spec.name == vm.spec.name {
            reasons.push(format!("a VM called {} runs here already", spec.name));
        }
        if spec.uuid.is_some() && spec.uuid == vm.spec.uuid {
            reasons.push(format!("VM {} here has the same uuid", spec.name));
        }
        for image in vm.disks.iter().filter(|d| other.record.images.contains(&d.path)) {
            reasons.push(format!("VM {} here uses {}", spec.name, image.path.display()));
        }
        for nic in spec.nics.iter().filter(|n| macs.contains(&n.mac.to_ascii_lowercase())) {
            reasons.push(format!("VM {} here has a card with address {}", spec.name, nic.mac));
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::qemu::probe::MachineFact;
    use crate::hypervisor::spec::host::NetworkBackend;

    fn facts() -> QemuFacts {
        let machine = |name: &str, alias: Option<&str>| MachineFact {
            name: name.into(),
            alias: alias.map(Into::into),
            cpu_max: 4,
        };
        QemuFacts {
            version: (10, 0, 2),
            machines: vec![machine("pc-q35-7.2", None), machine("pc-q35-10.0", Some("q35"))],
            cpu_models: vec!["qemu64".into()],
        }
    }

    fn spec() -> VmSpec {
        let mut spec: VmSpec = toml::from_str(include_str!("args/web1.toml")).unwrap();
        spec.firmware = Default::default();
        spec.cpu.model = "qemu64".into();
        spec.memory_mib = 16;
        spec
    }

    #[test]
    fn a_host_says_everything_that_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let mut policy = HostPolicy { run_dir: dir.path().into(), ..HostPolicy::default() };
        policy.pools.insert("default".into(), dir.path().into());
        policy.networks.insert("lan".into(), NetworkBackend::User { restrict: false });
        policy.networks.insert("none".into(), NetworkBackend::None);
        assert_eq!(can_host(&spec(), &policy, &facts(), &[4096, 4096]), Vec::<String>::new());

        let mut other = spec();
        other.machine = "pc-q35-99.0".into();
        other.cpu.model = "EPYC".into();
        other.memory_mib = 128 << 10;
        let said = can_host(&other, &policy, &facts(), &[1 << 60, 1 << 60]).join("; ");
        for part in [
            "no machine type pc-q35-99.0; its newest is pc-q35-10.0",
            "no CPU model EPYC",
            "MiB are available here",
            "its disks may grow by",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let mut many = spec();
        many.vcpus = 8;
        many.topology = None;
        let said = can_host(&many, &policy, &facts(), &[0]).join("; ");
        assert!(said.contains("at most 4 virtual CPUs"), "{said}");
        assert!(said.contains("2 disks and sizes came for 1"), "{said}");

        policy.pools.clear();
        let said = can_host(&spec(), &policy, &facts(), &[0, 0]).join("; ");
        assert!(said.contains("no pool called default"), "{said}");
    }
}
