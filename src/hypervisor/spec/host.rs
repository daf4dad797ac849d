//! What this host's operator allows, and what a description means here.
//!
//! Invariant: a resolved file of a description from elsewhere lies directly in a pool's folder, and
//! is a plain file or not there yet: no name, link or path in a description leads out of it.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Accel, FirmwareSpec, ImageLocation, NetworkKind, VmSpec};

/// What this host's operator allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPolicy {
    /// The hypervisor's program.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
    /// Folder for sockets, logs and records of running VMs. A short path: socket names are limited.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Folders for images, by the names that descriptions use.
    #[serde(default)]
    pub pools: BTreeMap<String, PathBuf>,
    /// Networks, by the names that descriptions use.
    #[serde(default)]
    pub networks: BTreeMap<String, NetworkBackend>,
    /// Firmware for flash, by the names that descriptions use.
    #[serde(default)]
    pub firmware: BTreeMap<String, PathBuf>,
    /// What may run guests.
    #[serde(default)]
    pub accel: AccelPreference,
    /// Most CPUs of one VM.
    #[serde(default = "default_vcpus_max")]
    pub vcpus_max: u32,
    /// Most memory of one VM, in MiB.
    #[serde(default = "default_memory_mib_max")]
    pub memory_mib_max: u64,
    /// Take rights away from the hypervisor that it does not need (its seccomp sandbox).
    #[serde(default = "default_sandbox")]
    pub sandbox: bool,
    /// Whether KVM was seen to run a guest here; set from a probe, never from a file.
    #[serde(skip)]
    pub kvm_works: bool,
}

fn default_qemu() -> PathBuf {
    PathBuf::from("/usr/bin/qemu-system-x86_64")
}

fn default_run_dir() -> PathBuf {
    PathBuf::from("/run/longhaul/vm")
}

fn default_vcpus_max() -> u32 {
    64
}

fn default_memory_mib_max() -> u64 {
    256 << 10
}

fn default_sandbox() -> bool {
    true
}

impl HostPolicy {
    /// Where a file lies that is given by pool and name.
    ///
    /// # Errors
    ///
    /// Why this host does not have it there, or would not have it, in a sentence.
    pub fn in_pool(&self, location: &ImageLocation) -> Result<PathBuf, String> {
        place(location, self, Author::Anybody)
    }
}

impl Default for HostPolicy {
    fn default() -> Self {
        Self {
            qemu: default_qemu(),
            run_dir: default_run_dir(),
            pools: BTreeMap::new(),
            networks: BTreeMap::new(),
            firmware: BTreeMap::new(),
            accel: AccelPreference::default(),
            vcpus_max: default_vcpus_max(),
            memory_mib_max: default_memory_mib_max(),
            sandbox: default_sandbox(),
            kvm_works: false,
        }
    }
}

/// What may run guests on this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelPreference {
    /// KVM if it works here, else translation.
    #[default]
    Auto,
    /// KVM only.
    Kvm,
    /// Translation only.
    Tcg,
}

/// What a network means on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum NetworkBackend {
    /// A bridge, joined through QEMU's bridge helper.
    Bridge {
        /// Name of the bridge.
        bridge: String,
        /// The helper, if it is not where QEMU looks for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        helper: Option<PathBuf>,
    },
    /// A new tap device, handed to a script that attaches it.
    Tap {
        /// Run with the device's name.
        script: PathBuf,
        /// Run with the device's name at the end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        down_script: Option<PathBuf>,
        /// Let the kernel move packets (vhost).
        #[serde(default)]
        vhost: bool,
    },
    /// QEMU's own user-mode network.
    User {
        /// Cut off from everything but QEMU's own servers.
        #[serde(default)]
        restrict: bool,
    },
    /// No cable.
    None,
}

impl NetworkBackend {
    /// What the guest can tell of it.
    pub fn kind(&self) -> NetworkKind {
        match self {
            Self::Bridge { .. } | Self::Tap { .. } => NetworkKind::Tap,
            Self::User { .. } => NetworkKind::User,
            Self::None => NetworkKind::None,
        }
    }
}

/// An image at its place on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedDisk {
    /// Where it lies.
    pub path: PathBuf,
    /// Whether that is a block device rather than a file.
    pub is_device: bool,
}

/// A description with every name replaced by what it means on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedVm {
    /// The description, all addresses, accelerator and backends written out. This is what the VM
    /// is from now on.
    pub spec: VmSpec,
    /// The hypervisor's program.
    pub qemu: PathBuf,
    /// What runs the guest.
    pub accel: Accel,
    /// Image of each disk, in their order.
    pub disks: Vec<ResolvedDisk>,
    /// Backend of each network card, in their order.
    pub nics: Vec<NetworkBackend>,
    /// Firmware in flash: code and variables.
    pub flash: Option<(PathBuf, PathBuf)>,
    /// Kernel and initrd, if they are all here.
    pub kernel: Option<(PathBuf, Option<PathBuf>)>,
    /// Whether to run sandboxed.
    pub sandbox: bool,
}

/// Who wrote a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Author {
    Operator,
    Anybody,
}

/// What `spec` means on a host with this policy. Files by path are refused: this is for
/// descriptions that may come from elsewhere.
///
/// # Errors
///
/// Every reason why this host cannot or will not have it, each a sentence.
pub fn resolve(spec: &VmSpec, policy: &HostPolicy) -> Result<ResolvedVm, Vec<String>> {
    resolve_for(spec, policy, Author::Anybody)
}

/// As [`resolve`], for a description that this host's operator wrote: files may be given by path.
///
/// # Errors
///
/// As [`resolve`].
pub fn resolve_own(spec: &VmSpec, policy: &HostPolicy) -> Result<ResolvedVm, Vec<String>> {
    resolve_for(spec, policy, Author::Operator)
}

fn resolve_for(
    spec: &VmSpec,
    policy: &HostPolicy,
    author: Author,
) -> Result<ResolvedVm, Vec<String>> {
    let mut spec = spec.addressed()?;
    let mut problems = Vec::new();
    if spec.vcpus > policy.vcpus_max {
        problems.push(format!(
            "it has {} virtual CPUs; this host allows {} (vcpus_max)",
            spec.vcpus, policy.vcpus_max
        ));
    }
    if spec.memory_mib > policy.memory_mib_max {
        problems.push(format!(
            "it has {} MiB of memory; this host allows {} (memory_mib_max)",
            spec.memory_mib, policy.memory_mib_max
        ));
    }
    let accel = match choose_accel(spec.accel, policy) {
        Ok(accel) => accel,
        Err(reason) => {
            problems.push(reason);
            Accel::Tcg
        }
    };
    spec.accel = Some(accel);

    let file = |what: &str, location: &ImageLocation, problems: &mut Vec<String>| {
        place(location, policy, author)
            .map_err(|reason| problems.push(format!("{what}: {reason}")))
            .unwrap_or_default()
    };
    let mut disks = Vec::new();
    for disk in &spec.disks {
        let path = file(&format!("disk {}", disk.id), &disk.location, &mut problems);
        let is_device = fs::metadata(&path).is_ok_and(|meta| meta.file_type().is_block_device());
        disks.push(ResolvedDisk { path, is_device });
    }
    let flash = match &spec.firmware {
        FirmwareSpec::Bios => None,
        FirmwareSpec::Uefi { code, vars, .. } => {
            let code = policy.firmware.get(code).cloned().unwrap_or_else(|| {
                problems.push(format!("this host has no firmware called {code} (firmware)"));
                PathBuf::new()
            });
            Some((code, file("firmware variables", vars, &mut problems)))
        }
    };
    let kernel = spec.kernel.as_ref().and_then(|k| {
        let kernel = file("kernel", &k.kernel, &mut problems);
        let initrd = k.initrd.as_ref().map(|i| file("initrd", i, &mut problems));
        let all_here = kernel.is_file() && initrd.as_ref().is_none_or(|i| i.is_file());
        all_here.then_some((kernel, initrd))
    });
    let mut nics = Vec::new();
    for nic in &mut spec.nics {
        let Some(backend) = policy.networks.get(&nic.network) else {
            problems.push(format!(
                "network card {}: this host has no network called {} (networks)",
                nic.id, nic.network
            ));
            continue;
        };
        let kind = backend.kind();
        if let Some(wanted) = nic.backend
            && wanted != kind
        {
            problems.push(format!(
                "network card {}: it was on a {} network, whose abilities and state are part of \
                 the VM's, and network {} of this host is a {} one",
                nic.id,
                wanted.name(),
                nic.network,
                kind.name()
            ));
        }
        nic.backend = Some(kind);
        nics.push(backend.clone());
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(ResolvedVm {
        spec,
        qemu: policy.qemu.clone(),
        accel,
        disks,
        nics,
        flash,
        kernel,
        sandbox: policy.sandbox,
    })
}

fn choose_accel(wanted: Option<Accel>, policy: &HostPolicy) -> Result<Accel, String> {
    let possible = match (policy.accel, policy.kvm_works) {
        (AccelPreference::Tcg, _) | (AccelPreference::Auto, false) => Accel::Tcg,
        (_, true) => Accel::Kvm,
        (AccelPreference::Kvm, false) => {
            return Err("this host runs guests with KVM only, and KVM does not work".to_owned());
        }
    };
    match wanted {
        // Where KVM works, translation works too, unless the operator wants none of it.
        Some(Accel::Tcg) if policy.accel != AccelPreference::Kvm => Ok(Accel::Tcg),
        Some(wanted) if wanted != possible => Err(format!(
            "it ran under {}, and this host runs guests under {}: its state cannot change over",
            wanted.name(),
            possible.name()
        )),
        _ => Ok(possible),
    }
}

/// Where a file lies on this host.
fn place(location: &ImageLocation, policy: &HostPolicy, author: Author) -> Result<PathBuf, String> {
    let (pool, file) = match location {
        ImageLocation::Path { path } if author == Author::Operator => return Ok(path.clone()),
        ImageLocation::Path { .. } => {
            return Err("it is given by a path: only a pool and a file name are accepted".into());
        }
        ImageLocation::Pool { pool, file } => (pool, file),
    };
    let dir = policy
        .pools
        .get(pool)
        .ok_or_else(|| format!("this host has no pool called {pool} (pools)"))?;
    in_pool(dir, file).map_err(|reason| format!("pool {pool}: {reason}"))
}

/// The path of `file` in the folder `dir`, if it is a plain file there or nothing yet.
fn in_pool(dir: &Path, file: &str) -> Result<PathBuf, String> {
    // The folder itself may be reached over links: its operator put them there.
    let dir = fs::canonicalize(dir)
        .map_err(|e| format!("its folder {} cannot be used: {e}", dir.display()))?;
    // Validation has refused anything but a plain name. Asked again where it matters most.
    if Path::new(file).file_name() != Some(file.as_ref()) {
        return Err(format!("{file:?} is no plain file name"));
    }
    let path = dir.join(file);
    match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_file() => Ok(path),
        Ok(meta) if meta.is_symlink() => {
            Err(format!("{file} is a symbolic link there, which could lead out of the pool"))
        }
        Ok(_) => Err(format!("{file} is there, and is no plain file")),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(path),
        Err(e) => Err(format!("{file} cannot be looked at: {e}")),
    }
}
