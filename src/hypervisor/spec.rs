//! What a VM is: typed data that a host can check and start, never a command line.
//!
//! Invariant: a description that came from a peer names pools and networks only; which folder or
//! bridge that means is decided by the host that starts it (see [`ImageLocation`],
//! [`NicSpec::network`], [`host`]). Nothing in it becomes part of a command line unless
//! [`VmSpec::validate`] has seen it.
//!
//! As text it is TOML (for people) or JSON (between agents); its enums tell themselves apart by
//! their fields, so formats without names cannot carry it.

mod address;
pub mod host;
pub mod models;
pub mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use validate::printable;

pub use address::PciAddress;
pub use models::{DeviceModel, DiskBus, NicModel, OptionKind, OptionRule, Place};

/// The pool that files given by their path belong to once a description leaves its host.
pub const DEFAULT_POOL: &str = "default";

/// Longest description that is read from a peer.
pub const SPEC_BYTES_MAX: usize = 256 << 10;

/// How an image file is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The guest's bytes, holes as holes.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// A VM, whole. The order of disks, NICs and devices is part of the description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The VM's name: letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// What its firmware tables call it, in the usual form (`8-4-4-4-12` hex digits).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The machine type with its version, such as `pc-q35-7.2`: an alias such as `q35` means
    /// another machine in each QEMU and is refused.
    pub machine: String,
    /// What runs the guest's instructions. A VM that ran under one cannot go on under the other;
    /// `None` only in descriptions of VMs that have not run yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<Accel>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Name of the memory region, where it is not the machine's own (`pc.ram`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_region: Option<String>,
    /// Order of boot devices for firmware that has no other (`c` disk, `d` CD-ROM, `n` network).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_order: Option<String>,
    /// A reboot ends the VM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_reboot: bool,
    /// The clock that the guest reads at its start.
    #[serde(default)]
    pub rtc: RtcSpec,
    /// The CPU's model.
    pub cpu: CpuSpec,
    /// How CPUs are arranged, where it is not the machine's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// Options of the machine type.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub machine_options: Options,
    /// What runs first.
    #[serde(default)]
    pub firmware: FirmwareSpec,
    /// A kernel that the firmware starts instead of a boot device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelSpec>,
    /// Disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network cards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicSpec>,
    /// Everything else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceSpec>,
}

/// Options of a device, machine or CPU by QEMU's names.
pub type Options = BTreeMap<String, OptionValue>;

/// The value of an option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionValue {
    /// On or off.
    Switch(bool),
    /// A count, size or index.
    Number(u64),
    /// One of a few words, such as `auto`.
    Word(String),
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The processor, through the kernel.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The CPU that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuSpec {
    /// QEMU's name of the model, such as `Skylake-Server` or `qemu64`.
    pub model: String,
    /// Features switched on or off, and values, on top of the model.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub features: Options,
}

/// How CPUs are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores of a socket.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

/// The clock at the guest's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcSpec {
    /// Which time it shows.
    #[serde(default)]
    pub base: RtcBase,
    /// Lost ticks are delivered late rather than dropped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub slew: bool,
}

/// Which time the guest's clock shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RtcBase {
    /// Universal time.
    #[default]
    Utc,
    /// The host's local time, as Windows expects it.
    LocalTime,
}

/// What runs first in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum FirmwareSpec {
    /// QEMU's own BIOS.
    #[default]
    Bios,
    /// Firmware in flash. Its content moves with the memory; the files must have equal sizes.
    Uefi {
        /// The firmware's name in the host's configuration.
        code: String,
        /// The raw file that holds its variables.
        vars: ImageLocation,
        /// Exact size of that file.
        vars_bytes: u64,
    },
}

/// A kernel that is started without a boot device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// The kernel's file.
    pub kernel: ImageLocation,
    /// Its first file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ImageLocation>,
    /// Its command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name within the VM, and of its node in the hypervisor.
    pub id: String,
    /// Where its image lies.
    pub location: ImageLocation,
    /// How the image is encoded.
    pub format: ImageFormat,
    /// How the guest reaches it.
    pub bus: DiskBus,
    /// PCI address, of disks that are PCI devices themselves; chosen if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<PciAddress>,
    /// Position on its controller, of those that are not; chosen if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<u8>,
    /// Id of its controller among the devices, for `scsi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<String>,
    /// How the host caches it.
    #[serde(default)]
    pub cache: CacheMode,
    /// Whether the guest's discards become holes in the image.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard: bool,
    /// Serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The guest cannot write to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Options of the device, by QEMU's names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: Options,
}

/// How the host caches a disk. The guest's flushes are always obeyed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Through the host's page cache.
    #[default]
    Writeback,
    /// Past it; needs a file system that can.
    None,
    /// Through it, and the guest is told that there is no cache: each write is durable.
    WriteThrough,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Its name within the VM.
    pub id: String,
    /// What the guest sees.
    pub model: NicModel,
    /// Hardware address, six hex pairs with colons.
    pub mac: String,
    /// The network's name in the host's configuration.
    pub network: String,
    /// What the network behind it is like: the guest adapts to it and some of it has state, so it
    /// must be alike at the target. `None` only in descriptions of VMs that have not run yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<NetworkKind>,
    /// PCI address; chosen if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<PciAddress>,
    /// Options of the device, by QEMU's names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: Options,
}

/// What the guest can tell of the network behind a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// A tap device, on a bridge or routed: it can take work off the guest's hands.
    Tap,
    /// QEMU's own user-mode network, whose connections are part of the VM's state.
    User,
    /// No cable.
    None,
}

impl NetworkKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::User => "user-mode",
            Self::None => "cable-less",
        }
    }
}

/// A device that is neither disk nor network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Its name within the VM.
    pub id: String,
    /// What it is.
    pub model: DeviceModel,
    /// PCI address, of PCI devices; chosen if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<PciAddress>,
    /// Id of the controller it hangs on, of USB devices and channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<String>,
    /// Position there, where it is not simply the next free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<u8>,
    /// Options of the device, by QEMU's names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: Options,
}

/// Where a file lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum ImageLocation {
    /// A file in one of the host's pools.
    Pool {
        /// The pool's name in the host's configuration.
        pool: String,
        /// A plain file name: no separators, no leading dot.
        file: String,
    },
    /// An absolute path: only in descriptions that this host's operator wrote.
    Path {
        /// The path.
        path: PathBuf,
    },
}

/// The family of a machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chipset {
    /// `pc-i440fx-*`.
    I440fx,
    /// `pc-q35-*`.
    Q35,
}

impl Chipset {
    /// Name of the bus that PCI addresses without a bus are on.
    pub fn root_bus(self) -> &'static str {
        match self {
            Self::I440fx => "pci.0",
            Self::Q35 => "pcie.0",
        }
    }
}

impl ImageLocation {
    /// The same file as another host may name it: in the pool `default`, by its file name.
    fn to_wire(&self) -> Self {
        match self {
            Self::Pool { .. } => self.clone(),
            Self::Path { path } => Self::Pool {
                pool: DEFAULT_POOL.to_owned(),
                // A path without a file name fails validation, at home as well as away.
                file: path.file_name().map_or_else(String::new, |f| f.to_string_lossy().into()),
            },
        }
    }

    /// The path, if it is given by one.
    pub fn as_path(&self) -> Option<&Path> {
        match self {
            Self::Pool { .. } => None,
            Self::Path { path } => Some(path),
        }
    }
}

impl std::fmt::Display for ImageLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pool { pool, file } => write!(f, "{file} in pool {pool}"),
            Self::Path { path } => write!(f, "{}", path.display()),
        }
    }
}

impl VmSpec {
    /// The machine's family, if it is one that Longhaul knows.
    pub fn chipset(&self) -> Option<Chipset> {
        let after = |prefix| self.machine.strip_prefix(prefix).filter(|rest| !rest.is_empty());
        if after("pc-i440fx-").is_some() {
            Some(Chipset::I440fx)
        } else {
            after("pc-q35-").map(|_| Chipset::Q35)
        }
    }

    /// Every file of this VM's, with what it is: disks, firmware variables, kernel.
    pub fn locations(&self) -> Vec<(String, &ImageLocation)> {
        let mut all: Vec<_> =
            self.disks.iter().map(|d| (format!("disk {}", d.id), &d.location)).collect();
        if let FirmwareSpec::Uefi { vars, .. } = &self.firmware {
            all.push(("firmware variables".to_owned(), vars));
        }
        if let Some(KernelSpec { kernel, initrd, .. }) = &self.kernel {
            all.push(("kernel".to_owned(), kernel));
            all.extend(initrd.iter().map(|i| ("initrd".to_owned(), i)));
        }
        all
    }

    /// The description as another host may see it: files given by their path become files of pool
    /// `default` under their file name, and every address is written out.
    ///
    /// # Errors
    ///
    /// Sentences that say what is wrong with it, if it cannot leave this host as it is: it does
    /// not [`validate`](Self::validate), or two files have the same name.
    pub fn to_wire(&self) -> Result<Self, Vec<String>> {
        let mut spec = self.addressed()?;
        for disk in &mut spec.disks {
            disk.location = disk.location.to_wire();
        }
        if let FirmwareSpec::Uefi { vars, .. } = &mut spec.firmware {
            *vars = vars.to_wire();
        }
        if let Some(KernelSpec { kernel, initrd, .. }) = &mut spec.kernel {
            *kernel = kernel.to_wire();
            *initrd = initrd.as_ref().map(ImageLocation::to_wire);
        }
        spec.validate()?;
        Ok(spec)
    }

    /// The bytes that [`from_peer`](Self::from_peer) reads.
    ///
    /// # Errors
    ///
    /// As [`to_wire`](Self::to_wire).
    pub fn to_peer(&self) -> Result<Vec<u8>, Vec<String>> {
        let bytes = serde_json::to_vec(&self.to_wire()?)
            .map_err(|e| vec![format!("the description cannot be written: {e}")])?;
        if bytes.len() > SPEC_BYTES_MAX {
            return Err(vec![format!("the description is longer than {SPEC_BYTES_MAX} bytes")]);
        }
        Ok(bytes)
    }

    /// Reads a description that a peer sent, trusting nothing in it.
    ///
    /// # Errors
    ///
    /// Sentences that say what is wrong with it, at least one.
    pub fn from_peer(bytes: &[u8]) -> Result<Self, Vec<String>> {
        if bytes.len() > SPEC_BYTES_MAX {
            return Err(vec![format!("the description is longer than {SPEC_BYTES_MAX} bytes")]);
        }
        let spec: Self = serde_json::from_slice(bytes)
            .map_err(|e| vec![printable(&format!("the description cannot be read: {e}"))])?;
        spec.validate()?;
        let paths: Vec<_> = spec
            .locations()
            .into_iter()
            .filter(|(_, location)| location.as_path().is_some())
            .map(|(what, _)| format!("{what} is given by a path, which a peer may not do"))
            .collect();
        if paths.is_empty() { Ok(spec) } else { Err(paths) }
    }

    /// Things that are allowed and still may keep the VM from arriving, each a sentence.
    pub fn warnings(&self) -> Vec<String> {
        let mut all = Vec::new();
        if ["host", "max"].contains(&self.cpu.model.as_str()) {
            all.push(format!(
                "cpu model {} is whatever its host has: the target must have the same processor, \
                 kernel and QEMU",
                self.cpu.model
            ));
        }
        if self.kernel.is_some() {
            all.push(
                "it boots from kernel files: without them the target can take it over, but it \
                 will not boot again there"
                    .to_owned(),
            );
        }
        all
    }
}

#[cfg(test)]
mod tests;
