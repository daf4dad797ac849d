//! The devices that Longhaul knows: QEMU's names, where they sit, which options they may have.
//!
//! Invariant: an option that is not in these tables never reaches a command line, so none in them
//! may name a file, a host device or a socket.

use serde::{Deserialize, Serialize};

/// How the guest reaches a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// A paravirtual PCI device of its own.
    VirtioBlk,
    /// A disk on a SCSI controller among the devices.
    Scsi,
    /// The machine's built-in SATA controller (`pc-q35`), units 0 to 5.
    Sata,
    /// The machine's built-in IDE controller (`pc-i440fx`), units 0 to 3.
    Ide,
}

/// What a network card looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicModel {
    /// Paravirtual.
    VirtioNet,
    /// Intel 82540EM.
    E1000,
    /// Intel 82574L.
    E1000e,
    /// Realtek 8139.
    Rtl8139,
}

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceModel {
    /// Entropy from the host.
    VirtioRng,
    /// Gives memory back to the host.
    VirtioBalloon,
    /// SCSI controller.
    VirtioScsi,
    /// Controller of channels.
    VirtioSerial,
    /// Channel to the guest's agent.
    GuestAgent,
    /// Paravirtual display that is also a plain one.
    VirtioVga,
    /// QEMU's standard display.
    Vga,
    /// Cirrus display.
    Cirrus,
    /// USB 3 controller.
    Xhci,
    /// USB pointer with absolute positions.
    UsbTablet,
    /// USB mouse.
    UsbMouse,
    /// USB keyboard.
    UsbKeyboard,
    /// Paravirtual pointer with absolute positions.
    VirtioTablet,
    /// Paravirtual keyboard.
    VirtioKeyboard,
    /// Watchdog.
    I6300esb,
    /// Tells of guest panics, at an I/O port.
    Pvpanic,
    /// Tells of guest panics, as a PCI device.
    PvpanicPci,
    /// PCI Express port with a bus of its own.
    PcieRootPort,
    /// PCI bridge with a bus of its own.
    PciBridge,
    /// Serial port.
    Serial,
    /// CD drive without a disc, on the built-in SATA or IDE controller.
    EmptyCdrom,
    /// Lets the guest describe its kernel for dumps.
    Vmcoreinfo,
}

/// Where a device sits, hence how it is addressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At a PCI address.
    Pci,
    /// At the machine's fixed ports.
    Isa,
    /// On a USB controller.
    Usb,
    /// On a channel controller.
    Channel,
    /// On the built-in SATA or IDE controller.
    Drive,
    /// Nowhere that has an address.
    Nowhere,
}

/// What values an option may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// On or off.
    Switch,
    /// On, off or `auto`, which QEMU reads as words.
    OnOffAuto,
    /// A number between two bounds, both included.
    Number(u64, u64),
    /// One of these words.
    Words(&'static [&'static str]),
    /// Text of at most so many letters, digits and `.`, `_`, `-`.
    Text(usize),
}

/// An option that a device may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionRule {
    /// QEMU's name.
    pub name: &'static str,
    /// What it takes.
    pub kind: OptionKind,
}

/// Every option table is a list of lists, so that families share theirs.
pub type OptionTable = &'static [&'static [OptionRule]];

const fn rule(name: &'static str, kind: OptionKind) -> OptionRule {
    OptionRule { name, kind }
}

use OptionKind::{Number, OnOffAuto, Switch, Text, Words};

const PCI: &[OptionRule] = &[
    rule("multifunction", Switch),
    rule("rombar", Number(0, 1)),
    rule("acpi-index", Number(0, 16_383)),
    // The empty name, which means no ROM, is the only one that names no file.
    rule("romfile", Words(&[""])),
];
const BOOT: &[OptionRule] = &[rule("bootindex", Number(0, 9999))];
const VIRTIO: &[OptionRule] = &[
    rule("disable-legacy", OnOffAuto),
    rule("disable-modern", Switch),
    rule("iommu_platform", Switch),
    rule("ats", Switch),
    rule("packed", Switch),
    rule("event_idx", Switch),
    rule("indirect_desc", Switch),
    rule("vectors", Number(0, 2048)),
    rule("page-per-vq", Switch),
];
const BLOCK: &[OptionRule] = &[
    rule("logical_block_size", Number(512, 32_768)),
    rule("physical_block_size", Number(512, 2 << 20)),
    rule("min_io_size", Number(0, 2 << 20)),
    rule("opt_io_size", Number(0, 64 << 20)),
    rule("discard_granularity", Number(0, 2 << 30)),
    rule("write-cache", OnOffAuto),
];
const VIRTIO_BLK: &[OptionRule] = &[
    rule("num-queues", Number(1, 1024)),
    rule("queue-size", Number(2, 1024)),
    rule("seg-max-adjust", Switch),
    rule("config-wce", Switch),
    rule("discard", Switch),
    rule("write-zeroes", Switch),
    rule("request-merging", Switch),
];
const SCSI_DISK: &[OptionRule] = &[
    rule("rotation_rate", Number(0, 65_535)),
    rule("device_id", Text(64)),
    rule("vendor", Text(8)),
    rule("product", Text(16)),
    rule("dpofua", Switch),
    rule("removable", Switch),
    rule("max_unmap_size", Number(0, 64 << 30)),
    rule("max_io_size", Number(0, 2 << 30)),
];
const IDE_DISK: &[OptionRule] = &[rule("rotation_rate", Number(0, 65_535))];
const VIRTIO_NET: &[OptionRule] = &[
    rule("csum", Switch),
    rule("guest_csum", Switch),
    rule("gso", Switch),
    rule("guest_tso4", Switch),
    rule("guest_tso6", Switch),
    rule("guest_ecn", Switch),
    rule("guest_ufo", Switch),
    rule("guest_announce", Switch),
    rule("host_tso4", Switch),
    rule("host_tso6", Switch),
    rule("host_ecn", Switch),
    rule("host_ufo", Switch),
    rule("mrg_rxbuf", Switch),
    rule("status", Switch),
    rule("ctrl_vq", Switch),
    rule("ctrl_rx", Switch),
    rule("ctrl_vlan", Switch),
    rule("ctrl_mac_addr", Switch),
    rule("host_mtu", Number(0, 65_535)),
    rule("rx_queue_size", Number(256, 1024)),
    rule("tx_queue_size", Number(256, 1024)),
];
const VIRTIO_RNG: &[OptionRule] =
    &[rule("max-bytes", Number(1, 1 << 40)), rule("period", Number(1, u32::MAX as u64))];
const VIRTIO_BALLOON: &[OptionRule] = &[
    rule("deflate-on-oom", Switch),
    rule("free-page-reporting", Switch),
    rule("guest-stats-polling-interval", Number(0, 86_400)),
];
const VIRTIO_SCSI: &[OptionRule] = &[
    rule("num_queues", Number(1, 1024)),
    rule("virtqueue_size", Number(2, 1024)),
    rule("seg_max_adjust", Switch),
    rule("max_sectors", Number(1, u32::MAX as u64)),
    rule("cmd_per_lun", Number(1, 1024)),
    rule("hotplug", Switch),
    rule("param_change", Switch),
];
const VIRTIO_SERIAL: &[OptionRule] = &[rule("max_ports", Number(1, 31))];
const DISPLAY: &[OptionRule] = &[
    rule("vgamem_mb", Number(1, 512)),
    rule("xres", Number(0, 16_384)),
    rule("yres", Number(0, 16_384)),
    rule("edid", Switch),
    rule("xmax", Number(0, 16_384)),
    rule("ymax", Number(0, 16_384)),
];
const VIRTIO_VGA: &[OptionRule] = &[rule("max_outputs", Number(1, 16))];
const XHCI: &[OptionRule] = &[
    rule("p2", Number(1, 15)),
    rule("p3", Number(1, 15)),
    rule("slots", Number(1, 64)),
    rule("intrs", Number(1, 16)),
    rule("msi", OnOffAuto),
    rule("msix", OnOffAuto),
];
const PVPANIC: &[OptionRule] = &[rule("ioport", Number(1, 65_535)), rule("events", Number(0, 255))];
const ROOT_PORT: &[OptionRule] = &[
    rule("port", Number(0, 255)),
    rule("chassis", Number(0, 255)),
    rule("slot", Number(0, 8191)),
    rule("hotplug", Switch),
];
const BRIDGE: &[OptionRule] =
    &[rule("chassis_nr", Number(1, 255)), rule("msi", OnOffAuto), rule("shpc", Switch)];
const SERIAL: &[OptionRule] = &[rule("index", Number(0, 3))];

/// Options of the machine type that the guest can tell apart.
pub const MACHINE: OptionTable = &[&[
    rule("usb", Switch),
    rule("smm", OnOffAuto),
    rule("vmport", OnOffAuto),
    rule("acpi", OnOffAuto),
    rule("hpet", Switch),
    rule("pit", Switch),
    rule("pic", OnOffAuto),
    rule("sata", Switch),
    rule("smbus", Switch),
    rule("i8042", Switch),
    rule("graphics", Switch),
    rule("kernel-irqchip", Words(&["on", "off", "split"])),
]];

impl DeviceModel {
    /// Every model.
    pub const ALL: [Self; 22] = [
        Self::VirtioRng,
        Self::VirtioBalloon,
        Self::VirtioScsi,
        Self::VirtioSerial,
        Self::GuestAgent,
        Self::VirtioVga,
        Self::Vga,
        Self::Cirrus,
        Self::Xhci,
        Self::UsbTablet,
        Self::UsbMouse,
        Self::UsbKeyboard,
        Self::VirtioTablet,
        Self::VirtioKeyboard,
        Self::I6300esb,
        Self::Pvpanic,
        Self::PvpanicPci,
        Self::PcieRootPort,
        Self::PciBridge,
        Self::Serial,
        Self::EmptyCdrom,
        Self::Vmcoreinfo,
    ];

    /// QEMU's name for it.
    pub fn driver(self) -> &'static str {
        match self {
            Self::VirtioRng => "virtio-rng-pci",
            Self::VirtioBalloon => "virtio-balloon-pci",
            Self::VirtioScsi => "virtio-scsi-pci",
            Self::VirtioSerial => "virtio-serial-pci",
            Self::GuestAgent => "virtserialport",
            Self::VirtioVga => "virtio-vga",
            Self::Vga => "VGA",
            Self::Cirrus => "cirrus-vga",
            Self::Xhci => "qemu-xhci",
            Self::UsbTablet => "usb-tablet",
            Self::UsbMouse => "usb-mouse",
            Self::UsbKeyboard => "usb-kbd",
            Self::VirtioTablet => "virtio-tablet-pci",
            Self::VirtioKeyboard => "virtio-keyboard-pci",
            Self::I6300esb => "i6300esb",
            Self::Pvpanic => "pvpanic",
            Self::PvpanicPci => "pvpanic-pci",
            Self::PcieRootPort => "pcie-root-port",
            Self::PciBridge => "pci-bridge",
            Self::Serial => "isa-serial",
            Self::EmptyCdrom => "ide-cd",
            Self::Vmcoreinfo => "vmcoreinfo",
        }
    }

    /// Where it sits.
    pub fn place(self) -> Place {
        match self {
            Self::GuestAgent => Place::Channel,
            Self::UsbTablet | Self::UsbMouse | Self::UsbKeyboard => Place::Usb,
            Self::Pvpanic | Self::Serial => Place::Isa,
            Self::EmptyCdrom => Place::Drive,
            Self::Vmcoreinfo => Place::Nowhere,
            _ => Place::Pci,
        }
    }

    /// Whether it has a PCI bus of its own.
    pub fn is_bridge(self) -> bool {
        matches!(self, Self::PcieRootPort | Self::PciBridge)
    }

    /// Options that it may have.
    pub fn options(self) -> OptionTable {
        match self {
            Self::VirtioRng => &[PCI, VIRTIO, VIRTIO_RNG],
            Self::VirtioBalloon => &[PCI, VIRTIO, VIRTIO_BALLOON],
            Self::VirtioScsi => &[PCI, VIRTIO, VIRTIO_SCSI],
            Self::VirtioSerial => &[PCI, VIRTIO, VIRTIO_SERIAL],
            Self::VirtioVga => &[PCI, VIRTIO, DISPLAY, VIRTIO_VGA],
            Self::VirtioTablet | Self::VirtioKeyboard => &[PCI, VIRTIO],
            Self::Vga | Self::Cirrus => &[PCI, DISPLAY],
            Self::Xhci => &[PCI, XHCI],
            Self::I6300esb | Self::PvpanicPci => &[PCI],
            Self::Pvpanic => &[PVPANIC],
            Self::PcieRootPort => &[PCI, ROOT_PORT],
            Self::PciBridge => &[PCI, BRIDGE],
            Self::Serial => &[SERIAL],
            Self::EmptyCdrom => &[BOOT],
            Self::GuestAgent
            | Self::UsbTablet
            | Self::UsbMouse
            | Self::UsbKeyboard
            | Self::Vmcoreinfo => &[],
        }
    }
}

impl DiskBus {
    /// Every bus.
    pub const ALL: [Self; 4] = [Self::VirtioBlk, Self::Scsi, Self::Sata, Self::Ide];

    /// QEMU's name of the disk's device.
    pub fn driver(self) -> &'static str {
        match self {
            Self::VirtioBlk => "virtio-blk-pci",
            Self::Scsi => "scsi-hd",
            Self::Sata | Self::Ide => "ide-hd",
        }
    }

    /// Options that the device may have.
    pub fn options(self) -> OptionTable {
        match self {
            Self::VirtioBlk => &[PCI, BOOT, VIRTIO, BLOCK, VIRTIO_BLK],
            Self::Scsi => &[BOOT, BLOCK, SCSI_DISK],
            Self::Sata | Self::Ide => &[BOOT, BLOCK, IDE_DISK],
        }
    }

    /// Positions on the built-in controller, if that is where it sits.
    pub fn units(self) -> Option<u8> {
        match self {
            Self::Sata => Some(6),
            Self::Ide => Some(4),
            Self::VirtioBlk | Self::Scsi => None,
        }
    }
}

impl NicModel {
    /// Every model.
    pub const ALL: [Self; 4] = [Self::VirtioNet, Self::E1000, Self::E1000e, Self::Rtl8139];

    /// QEMU's name for it.
    pub fn driver(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net-pci",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Rtl8139 => "rtl8139",
        }
    }

    /// Options that it may have.
    pub fn options(self) -> OptionTable {
        match self {
            Self::VirtioNet => &[PCI, BOOT, VIRTIO, VIRTIO_NET],
            Self::E1000 | Self::E1000e | Self::Rtl8139 => &[PCI, BOOT],
        }
    }
}

/// The rule for an option in a table.
pub fn find_rule(table: OptionTable, name: &str) -> Option<OptionKind> {
    table.iter().copied().flatten().find(|rule| rule.name == name).map(|rule| rule.kind)
}
