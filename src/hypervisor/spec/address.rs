//! PCI addresses: how they are written, and how those that a description leaves open are chosen.
//!
//! Invariant: the choice depends on the description alone, so two hosts choose alike: a device's
//! address is its name in the migration stream.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Chipset, DeviceModel, DiskBus, Place, VmSpec};

/// Slots on a PCI bus.
const SLOTS: u8 = 32;

/// Where a PCI device sits: `03.0` (slot and function, in hex) on the root bus, or `port1:00.0` on
/// the bus of the bridge or port with that id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Id of the bridge, `None` for the root bus.
    pub bridge: Option<String>,
    /// Slot, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// An address on the root bus.
    pub fn root(slot: u8, function: u8) -> Self {
        Self { bridge: None, slot, function }
    }

    /// As QEMU's `addr` option takes it.
    pub fn addr(&self) -> String {
        format!("{:02x}.{:x}", self.slot, self.function)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.bridge {
            Some(bridge) => write!(f, "{bridge}:{}", self.addr()),
            None => f.write_str(&self.addr()),
        }
    }
}

impl FromStr for PciAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no PCI address: write slot and function in hex, such as 03.0");
        let (bridge, rest) = match text.rsplit_once(':') {
            Some((bridge, rest)) => (Some(bridge.to_owned()), rest),
            None => (None, text),
        };
        let (slot, function) = rest.split_once('.').unwrap_or((rest, "0"));
        // At most what the fields can hold: no sign, no long row of zeros.
        let digits = |s: &str, max: usize| {
            (1..=max).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit())
        };
        if !digits(slot, 2) || !digits(function, 1) {
            return Err(wrong());
        }
        let slot = u8::from_str_radix(slot, 16).map_err(|_| wrong())?;
        let function = u8::from_str_radix(function, 16).map_err(|_| wrong())?;
        if slot >= SLOTS || function > 7 || bridge.as_deref() == Some("") {
            return Err(wrong());
        }
        Ok(Self { bridge, slot, function })
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Chipset {
    /// Whether the machine itself occupies a slot of the root bus.
    pub fn occupies(self, slot: u8) -> bool {
        match self {
            Self::I440fx => slot <= 1,
            Self::Q35 => slot == 0 || slot == 0x1f,
        }
    }
}

impl VmSpec {
    /// The same VM with every PCI address and drive unit written out.
    ///
    /// # Errors
    ///
    /// Sentences that say what is wrong, if it does not validate or no place is left.
    pub fn addressed(&self) -> Result<Self, Vec<String>> {
        self.validate()?;
        let mut spec = self.clone();
        let chipset = spec.chipset().ok_or_else(|| vec!["unknown machine type".to_owned()])?;
        let mut used: BTreeSet<u8> = (0..SLOTS).filter(|&slot| chipset.occupies(slot)).collect();
        let given = |slot: &Option<PciAddress>| match slot {
            Some(PciAddress { bridge: None, slot, .. }) => Some(*slot),
            _ => None,
        };
        used.extend(spec.devices.iter().filter_map(|d| given(&d.slot)));
        used.extend(spec.nics.iter().filter_map(|n| given(&n.slot)));
        used.extend(spec.disks.iter().filter_map(|d| given(&d.slot)));

        let mut full = false;
        let mut choose = |slot: &mut Option<PciAddress>| {
            if slot.is_none() {
                match (0..SLOTS).find(|slot| !used.contains(slot)) {
                    Some(free) => {
                        used.insert(free);
                        *slot = Some(PciAddress::root(free, 0));
                    }
                    None => full = true,
                }
            }
        };
        let pci_devices = spec.devices.iter_mut().filter(|d| d.model.place() == Place::Pci);
        pci_devices.for_each(|d| choose(&mut d.slot));
        spec.nics.iter_mut().for_each(|n| choose(&mut n.slot));
        let pci_disks = spec.disks.iter_mut().filter(|d| d.bus == DiskBus::VirtioBlk);
        pci_disks.for_each(|d| choose(&mut d.slot));
        if full {
            return Err(vec![
                "no PCI slot is left: put devices behind a pci-bridge or on functions of one slot"
                    .to_owned(),
            ]);
        }
        spec.choose_units()?;
        Ok(spec)
    }

    /// Gives every disk and CD drive that hangs on a controller its position.
    fn choose_units(&mut self) -> Result<(), Vec<String>> {
        // Built-in drives share one controller, whose name is no id and thus cannot clash.
        const BUILT_IN: &str = "";
        let mut used: BTreeSet<(String, u8)> = BTreeSet::new();
        let home =
            |controller: &Option<String>| controller.clone().unwrap_or_else(|| BUILT_IN.to_owned());
        used.extend(self.disks.iter().filter_map(|d| Some((home(&d.controller), d.unit?))));
        let is_cdrom = |model: DeviceModel| model == DeviceModel::EmptyCdrom;
        used.extend(
            self.devices
                .iter()
                .filter(|d| is_cdrom(d.model))
                .filter_map(|d| Some((BUILT_IN.to_owned(), d.unit?))),
        );
        let built_in = match self.chipset() {
            Some(Chipset::Q35) => 6,
            _ => 4,
        };
        let mut full = Vec::new();
        let mut choose = |id: &str, home: String, units: u8, unit: &mut Option<u8>| {
            if unit.is_none() {
                *unit = (0..units).find(|u| !used.contains(&(home.clone(), *u)));
                match *unit {
                    Some(chosen) => drop(used.insert((home, chosen))),
                    None => full.push(format!("no position is left for {id} on its controller")),
                }
            }
        };
        for disk in self.disks.iter_mut().filter(|d| d.bus != DiskBus::VirtioBlk) {
            let units = disk.bus.units().unwrap_or(u8::MAX);
            choose(&disk.id, home(&disk.controller), units, &mut disk.unit);
        }
        for device in self.devices.iter_mut().filter(|d| is_cdrom(d.model)) {
            choose(&device.id, BUILT_IN.to_owned(), built_in, &mut device.unit);
        }
        if full.is_empty() { Ok(()) } else { Err(full) }
    }
}
