//! QEMU's other names for devices, what comes with a machine, and ids for what has none. Pure.

use std::collections::BTreeSet;

use crate::hypervisor::spec::validate::{ID_BYTES_MAX, OURS, is_name};
use crate::hypervisor::spec::{DeviceModel, DiskBus, NicModel};

/// The name of a device's type that QEMU itself uses.
pub(super) fn canonical(driver: &str) -> &str {
    match driver {
        "virtio-blk" => "virtio-blk-pci",
        "virtio-net" | "virtio" => "virtio-net-pci",
        "virtio-scsi" => "virtio-scsi-pci",
        "virtio-rng" => "virtio-rng-pci",
        "virtio-balloon" => "virtio-balloon-pci",
        "virtio-serial" => "virtio-serial-pci",
        "virtio-keyboard" => "virtio-keyboard-pci",
        "virtio-tablet" => "virtio-tablet-pci",
        "e1000-82540em" => "e1000",
        other => other,
    }
}

/// Whether a device of this type comes with every machine of its kind, unasked.
pub(super) fn is_chipset(driver: &str) -> bool {
    const CHIPSET: [&str; 33] = [
        "ICH9-LPC",
        "ICH9-SMB",
        "PIIX3",
        "PIIX4_PM",
        "PIIX3-xen",
        "fw_cfg",
        "fw_cfg_io",
        "hpet",
        "i440FX",
        "i8042",
        "i8257",
        "ich9-ahci",
        "ich9-usb-ehci1",
        "ich9-usb-uhci1",
        "ich9-usb-uhci2",
        "ich9-usb-uhci3",
        "ioapic",
        "isa-fdc",
        "isa-i8259",
        "isa-pcspk",
        "isa-pit",
        "kvm-i8259",
        "kvm-ioapic",
        "kvm-pit",
        "kvmclock",
        "kvmvapic",
        "mc146818rtc",
        "piix3-ide",
        "piix3-usb-uhci",
        "port92",
        "smbus-eeprom",
        "vmmouse",
        "vmport",
    ];
    CHIPSET.contains(&driver) || driver.ends_with("-x86_64-cpu")
}

/// What a type of device is to a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Disk(DiskBus),
    Cdrom,
    Nic(NicModel),
    Device(DeviceModel),
    Unknown,
}

/// What a device of this type is; disks on built-in controllers count as SATA here.
pub(super) fn kind_of(driver: &str) -> Kind {
    if ["ide-cd", "scsi-cd"].contains(&driver) {
        return Kind::Cdrom;
    }
    if let Some(bus) = DiskBus::ALL.into_iter().find(|b| b.driver() == driver) {
        return Kind::Disk(bus);
    }
    if let Some(model) = NicModel::ALL.into_iter().find(|m| m.driver() == driver) {
        return Kind::Nic(model);
    }
    let device = DeviceModel::ALL.into_iter().find(|m| m.driver() == driver);
    device.map_or(Kind::Unknown, Kind::Device)
}

/// Gives out ids that a description may have, each once.
#[derive(Debug, Default)]
pub(super) struct Ids(BTreeSet<String>);

impl Ids {
    /// `wanted` if it can be had, else `base` with a number.
    pub(super) fn give(&mut self, wanted: Option<&str>, base: &str) -> String {
        let fits = |id: &&str| {
            is_name(id, ID_BYTES_MAX)
                && id.starts_with(|c: char| c.is_ascii_alphabetic())
                && !id.starts_with(OURS)
                && !id.ends_with("-file")
        };
        if let Some(id) = wanted.filter(fits)
            && self.0.insert(id.to_owned())
        {
            return id.to_owned();
        }
        // One of so many numbers is free: at most so many ids were given out.
        let free = (0..=self.0.len()).map(|n| format!("{base}{n}"));
        let id = free.into_iter().find(|id| !self.0.contains(id));
        let id = id.expect("more numbers than ids were tried");
        self.0.insert(id.clone());
        id
    }
}
