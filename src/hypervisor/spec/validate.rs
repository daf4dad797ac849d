//! Checks a description as if its author were an enemy.
//!
//! Invariant: what passes holds no character that a command line, a path or a log could take for
//! something else, no number outside its bounds, and no reference to what is not in it.

use std::collections::{BTreeMap, BTreeSet};

use super::models::{self, OptionKind, OptionTable, find_rule};
use super::{
    Chipset, DeviceModel, DiskBus, FirmwareSpec, ImageLocation, OptionValue, Options, PciAddress,
    Place, VmSpec,
};

/// Longest name of a VM, pool, network or firmware.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest id of a disk, card or device. QEMU's block node names have 31 characters, and a disk
/// needs some of them to tell its nodes apart.
pub const ID_BYTES_MAX: usize = 24;
/// Longest name of an image file.
const FILE_BYTES_MAX: usize = 200;
/// Longest path that an operator may write.
const PATH_BYTES_MAX: usize = 4096;
/// Longest value that is a word.
const WORD_BYTES_MAX: usize = 64;
/// Longest serial number of a disk that every bus can show.
const SERIAL_BYTES_MAX: usize = 20;
/// Longest kernel command line on this architecture.
const APPEND_BYTES_MAX: usize = 2047;
/// Most virtual CPUs; the host's own limit is lower.
const VCPUS_MAX: u32 = 512;
/// Most memory, 16 TiB; the host's own limit is lower.
const MEMORY_MIB_MAX: u64 = 16 << 20;
/// Most disks.
pub const DISKS_MAX: usize = 32;
/// Most network cards.
const NICS_MAX: usize = 16;
/// Most other devices.
const DEVICES_MAX: usize = 64;
/// Most options of one device, and of the machine.
const OPTIONS_MAX: usize = 32;
/// Most CPU features.
const FEATURES_MAX: usize = 512;
/// Most problems that are told at once.
const PROBLEMS_MAX: usize = 50;
/// Longest sentence about a problem.
const PROBLEM_CHARS_MAX: usize = 500;
/// Most serial ports: the addresses that PCs have for them.
const SERIAL_PORTS_MAX: usize = 4;
/// Ids that begin like this belong to Longhaul.
pub const OURS: &str = "longhaul-";

/// Whether `name` is short and made of `[A-Za-z0-9._-]`, beginning with a letter or digit.
pub fn is_name(name: &str, bytes_max: usize) -> bool {
    name.len() <= bytes_max
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Whether `file` is a plain file name.
fn is_file_name(file: &str) -> bool {
    file.len() <= FILE_BYTES_MAX
        && file.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+@-".contains(&b))
}

/// A sentence that quotes a peer, fit for a log: one line, bounded.
pub fn printable(text: &str) -> String {
    let escape = |c: char| {
        let plain = (!c.is_control()).then_some(c);
        let escaped = c.is_control().then(|| c.escape_default());
        plain.into_iter().chain(escaped.into_iter().flatten())
    };
    text.chars().flat_map(escape).take(PROBLEM_CHARS_MAX).collect()
}

/// What a peer wrote, fit to be shown: short, printable, in quotes.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(NAME_BYTES_MAX).collect();
    let dots = if cut.len() < text.len() { ".." } else { "" };
    format!("\"{}{dots}\"", cut.escape_default())
}

/// Whether `mac` is six hex pairs with colons, of one card only.
fn is_mac(mac: &str) -> bool {
    let pairs: Vec<&str> = mac.split(':').collect();
    let hex = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
    pairs.len() == 6
        && pairs.iter().all(hex)
        && u8::from_str_radix(pairs[0], 16).is_ok_and(|first| first & 1 == 0)
        && pairs.iter().any(|p| *p != "00")
}

fn is_uuid(uuid: &str) -> bool {
    uuid.len() == 36
        && uuid.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

/// Problems, collected.
struct Problems(Vec<String>);

impl Problems {
    fn say(&mut self, problem: impl AsRef<str>) {
        self.0.push(printable(problem.as_ref()));
    }

    fn unless(&mut self, fine: bool, problem: impl FnOnce() -> String) {
        if !fine {
            self.say(problem());
        }
    }
}

impl VmSpec {
    /// Checks everything that can be checked without a host.
    ///
    /// # Errors
    ///
    /// Every problem found (up to a limit), each a sentence.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut p = Problems(Vec::new());
        // Counts first: the checks below may then be quadratic.
        for (what, count, max) in [
            ("disks", self.disks.len(), DISKS_MAX),
            ("network cards", self.nics.len(), NICS_MAX),
            ("devices", self.devices.len(), DEVICES_MAX),
            ("cpu features", self.cpu.features.len(), FEATURES_MAX),
        ] {
            p.unless(count <= max, || format!("{count} {what} are more than the {max} allowed"));
        }
        if p.0.is_empty() {
            self.check_machine(&mut p);
            self.check_files(&mut p);
            self.check_devices(&mut p);
            self.check_places(&mut p);
        }
        p.0.truncate(PROBLEMS_MAX);
        if p.0.is_empty() { Ok(()) } else { Err(p.0) }
    }

    fn check_machine(&self, p: &mut Problems) {
        p.unless(is_name(&self.name, NAME_BYTES_MAX), || {
            format!(
                "name {} must be 1 to {NAME_BYTES_MAX} letters, digits, dots, underscores or \
                 hyphens, and begin with a letter or digit",
                shown(&self.name)
            )
        });
        if let Some(uuid) = &self.uuid {
            p.unless(is_uuid(uuid), || format!("uuid {} is none", shown(uuid)));
        }
        self.check_machine_type(p);
        check_options("the machine", &self.machine_options, models::MACHINE, p);
        p.unless((1..=VCPUS_MAX).contains(&self.vcpus), || {
            format!("vcpus is {}: it must be 1 to {VCPUS_MAX}", self.vcpus)
        });
        p.unless((1..=MEMORY_MIB_MAX).contains(&self.memory_mib), || {
            format!("memory_mib is {}: it must be 1 to {MEMORY_MIB_MAX}", self.memory_mib)
        });
        if let Some(region) = &self.memory_region {
            let fine = is_name(region, NAME_BYTES_MAX)
                && region.starts_with(|c: char| c.is_ascii_alphabetic())
                && !region.ends_with("-rng");
            p.unless(fine, || format!("memory_region {} is no plain name", shown(region)));
        }
        if let Some(t) = self.topology {
            let cpus = u64::from(t.sockets)
                .saturating_mul(u64::from(t.cores))
                .saturating_mul(u64::from(t.threads));
            p.unless(cpus == u64::from(self.vcpus), || {
                format!("the topology has {cpus} cpus, vcpus says {}", self.vcpus)
            });
        }
        if let Some(order) = &self.boot_order {
            let unique: BTreeSet<_> = order.bytes().collect();
            let fine = order.bytes().all(|b| (b'a'..=b'p').contains(&b))
                && unique.len() == order.len()
                && !order.is_empty();
            p.unless(fine, || {
                format!("boot_order {} must be letters a to p, each at most once", shown(order))
            });
        }
        p.unless(is_name(&self.cpu.model, NAME_BYTES_MAX), || {
            format!("cpu model {} is no plain name", shown(&self.cpu.model))
        });
        for (feature, value) in &self.cpu.features {
            p.unless(is_name(feature, NAME_BYTES_MAX), || {
                format!("cpu feature {} is no plain name", shown(feature))
            });
            p.unless(is_plain_value(value), || {
                format!("the value of cpu feature {} is no plain word", shown(feature))
            });
        }
    }

    fn check_machine_type(&self, p: &mut Problems) {
        let machine = self.machine.as_str();
        let plain = machine.len() <= NAME_BYTES_MAX
            && machine.bytes().all(|b| b.is_ascii_alphanumeric() || b"._+-".contains(&b));
        match (machine, self.chipset()) {
            ("q35" | "pc", _) => {
                let family = if machine == "pc" { "pc-i440fx" } else { "pc-q35" };
                p.say(format!(
                    "machine {machine} means another machine in each QEMU version: write it with \
                     its version, such as {family}-7.2 (`qemu-system-x86_64 -machine help` tells \
                     which one {machine} is)"
                ));
            }
            (_, Some(_)) if plain => {}
            _ => p.say(format!(
                "machine {} is not known: it must be a pc-q35 or pc-i440fx with a version, such \
                 as pc-q35-7.2",
                shown(machine)
            )),
        }
    }

    fn check_files(&self, p: &mut Problems) {
        for (what, location) in self.locations() {
            match location {
                ImageLocation::Pool { pool, file } => {
                    p.unless(is_name(pool, NAME_BYTES_MAX), || {
                        format!("{what}: pool {} is no plain name", shown(pool))
                    });
                    p.unless(is_file_name(file), || {
                        format!(
                            "{what}: file {} must be a plain file name of letters, digits and \
                             . _ + @ -",
                            shown(file)
                        )
                    });
                }
                ImageLocation::Path { path } => {
                    let text = path.as_os_str().as_encoded_bytes();
                    let fine = path.is_absolute()
                        && path.file_name().is_some()
                        && text.len() <= PATH_BYTES_MAX
                        && std::str::from_utf8(text)
                            .is_ok_and(|t| !t.contains(|c: char| c.is_control()));
                    p.unless(fine, || {
                        format!(
                            "{what}: path {} must be absolute and plain text",
                            shown(&path.to_string_lossy())
                        )
                    });
                }
            }
        }
        let mut seen = BTreeMap::new();
        for (what, location) in self.locations() {
            if let Some(first) = seen.insert(location.to_string(), what.clone()) {
                p.say(format!("{what} and {first} are the same file, {}", shown_at(location)));
            }
        }
        if let FirmwareSpec::Uefi { code, vars_bytes, .. } = &self.firmware {
            p.unless(is_name(code, NAME_BYTES_MAX), || {
                format!("firmware {} is no plain name", shown(code))
            });
            // QEMU maps flash in 4 KiB sectors, at most 8 MiB of it below 4 GiB.
            p.unless(vars_bytes % 4096 == 0 && (4096..=8 << 20).contains(vars_bytes), || {
                format!("vars_bytes is {vars_bytes}: it must be a multiple of 4096 up to 8388608")
            });
        }
        if let Some(kernel) = &self.kernel {
            let fine = kernel.append.len() <= APPEND_BYTES_MAX
                && kernel.append.bytes().all(|b| (0x20..0x7f).contains(&b));
            p.unless(fine, || {
                format!("the kernel's command line must be at most {APPEND_BYTES_MAX} plain bytes")
            });
        }
    }

    fn check_devices(&self, p: &mut Problems) {
        let mut ids = BTreeSet::new();
        let all = (self.disks.iter().map(|d| ("disk", &d.id)))
            .chain(self.nics.iter().map(|n| ("network card", &n.id)))
            .chain(self.devices.iter().map(|d| ("device", &d.id)));
        for (what, id) in all {
            // QEMU's own rule for ids asks for a letter first.
            let fine = is_name(id, ID_BYTES_MAX)
                && id.starts_with(|c: char| c.is_ascii_alphabetic())
                && !id.starts_with(OURS);
            p.unless(fine, || {
                format!(
                    "{what}: id {} must begin with a letter, not with {OURS}, and have at most \
                     {ID_BYTES_MAX} letters, digits, dots, underscores or hyphens",
                    shown(id)
                )
            });
            p.unless(ids.insert(id), || format!("{what}: id {} is taken already", shown(id)));
        }
        for disk in &self.disks {
            let what = format!("disk {}", shown(&disk.id));
            check_options(&what, &disk.options, disk.bus.options(), p);
            p.unless(!disk.id.ends_with("-file"), || {
                format!("{what}: its id may not end in -file, which names its image's node")
            });
            if let Some(serial) = &disk.serial {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
                let fine = serial.len() <= SERIAL_BYTES_MAX && serial.bytes().all(plain);
                p.unless(fine && !serial.is_empty(), || {
                    format!("{what}: serial {} is not plain or too long", shown(serial))
                });
            }
            p.unless(!(disk.read_only && disk.bus.units().is_some()), || {
                format!("{what}: disks on built-in controllers cannot be read-only")
            });
        }
        for nic in &self.nics {
            let what = format!("network card {}", shown(&nic.id));
            check_options(&what, &nic.options, nic.model.options(), p);
            p.unless(is_mac(&nic.mac), || {
                format!("{what}: mac {} is no address of one card", shown(&nic.mac))
            });
            p.unless(is_name(&nic.network, NAME_BYTES_MAX), || {
                format!("{what}: network {} is no plain name", shown(&nic.network))
            });
        }
        for device in &self.devices {
            let what = format!("device {}", shown(&device.id));
            check_options(&what, &device.options, device.model.options(), p);
        }
        let serials = self.devices.iter().filter(|d| d.model == DeviceModel::Serial).count();
        p.unless(serials <= SERIAL_PORTS_MAX, || {
            format!("{serials} serial ports are more than the {SERIAL_PORTS_MAX} of a PC")
        });
    }

    fn check_places(&self, p: &mut Problems) {
        let Some(chipset) = self.chipset() else { return };
        self.check_slots(chipset, p);
        let mut positions = BTreeSet::new();
        let built_in = match chipset {
            Chipset::Q35 => DiskBus::Sata,
            Chipset::I440fx => DiskBus::Ide,
        };
        for disk in &self.disks {
            let what = format!("disk {}", shown(&disk.id));
            match disk.bus {
                DiskBus::VirtioBlk => {
                    p.unless(disk.unit.is_none() && disk.controller.is_none(), || {
                        format!("{what}: a virtio-blk disk has a slot, no unit or controller")
                    });
                    continue;
                }
                DiskBus::Scsi => match &disk.controller {
                    Some(id) if self.is_device(id, DeviceModel::VirtioScsi) => {}
                    _ => p.say(format!("{what}: its controller must name a virtio-scsi device")),
                },
                DiskBus::Sata | DiskBus::Ide => {
                    p.unless(disk.bus == built_in && disk.controller.is_none(), || {
                        format!("{what}: {} has no such controller", shown(&self.machine))
                    });
                }
            }
            p.unless(disk.slot.is_none(), || format!("{what}: only virtio-blk disks have a slot"));
            if let Some(unit) = disk.unit {
                let fits = disk.bus.units().is_none_or(|units| unit < units);
                p.unless(fits && positions.insert((disk.controller.as_deref(), unit)), || {
                    format!("{what}: unit {unit} does not exist or is taken")
                });
            }
        }
        for device in &self.devices {
            let what = format!("device {}", shown(&device.id));
            let place = device.model.place();
            p.unless(device.slot.is_none() || place == Place::Pci, || {
                format!("{what}: it is no PCI device and has no slot")
            });
            let holder = match place {
                Place::Usb => Some(DeviceModel::Xhci),
                Place::Channel => Some(DeviceModel::VirtioSerial),
                _ => None,
            };
            match (holder, &device.controller) {
                (None, None) => {}
                (Some(holder), Some(id)) if self.is_device(id, holder) => {}
                (None, Some(_)) => p.say(format!("{what}: it hangs on no controller")),
                (Some(holder), _) => {
                    p.say(format!("{what}: its controller must name a {} device", holder.driver()))
                }
            }
            match (place, device.unit) {
                (_, None) => {}
                (Place::Drive, Some(unit)) => {
                    let fine = built_in.units().is_some_and(|units| unit < units)
                        && positions.insert((None, unit));
                    p.unless(fine, || format!("{what}: unit {unit} does not exist or is taken"));
                }
                (Place::Usb | Place::Channel, Some(unit)) => {
                    p.unless((1..=31).contains(&unit), || {
                        format!("{what}: unit {unit} must be 1 to 31")
                    });
                }
                _ => p.say(format!("{what}: it has no unit")),
            }
        }
    }

    fn check_slots(&self, chipset: Chipset, p: &mut Problems) {
        let mut taken: BTreeMap<&PciAddress, &str> = BTreeMap::new();
        let slots = (self.devices.iter().map(|d| (d.id.as_str(), &d.slot)))
            .chain(self.nics.iter().map(|n| (n.id.as_str(), &n.slot)))
            .chain(self.disks.iter().map(|d| (d.id.as_str(), &d.slot)));
        for (id, slot) in slots.filter_map(|(id, slot)| Some((id, slot.as_ref()?))) {
            match &slot.bridge {
                None => p.unless(!chipset.occupies(slot.slot), || {
                    format!("{}: slot {slot} belongs to the machine itself", shown(id))
                }),
                Some(bridge) => {
                    // Bridges come in the order of the description, so those that hold must precede.
                    let position = |id: &str| self.devices.iter().position(|d| d.id == id);
                    let holder = position(bridge).filter(|&i| self.devices[i].model.is_bridge());
                    let fine = match (holder, position(id)) {
                        (Some(holder), Some(own)) => holder < own,
                        (holder, None) => holder.is_some(),
                        _ => false,
                    };
                    p.unless(fine, || {
                        format!(
                            "{}: slot {} needs a bridge or port of that name before it",
                            shown(id),
                            shown(&slot.to_string())
                        )
                    });
                }
            }
            if let Some(other) = taken.insert(slot, id) {
                p.say(format!(
                    "{} and {} have the same slot {}",
                    shown(id),
                    shown(other),
                    shown(&slot.to_string())
                ));
            }
        }
    }

    fn is_device(&self, id: &str, model: DeviceModel) -> bool {
        self.devices.iter().any(|d| d.id == id && d.model == model)
    }
}

fn shown_at(location: &ImageLocation) -> String {
    shown(&location.to_string())
}

/// Whether a value without a rule of its own is harmless on a command line.
fn is_plain_value(value: &OptionValue) -> bool {
    match value {
        OptionValue::Switch(_) | OptionValue::Number(_) => true,
        OptionValue::Word(word) => {
            !word.is_empty()
                && word.len() <= WORD_BYTES_MAX
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || b" ._()@-".contains(&b))
        }
    }
}

fn check_options(what: &str, options: &Options, table: OptionTable, p: &mut Problems) {
    p.unless(options.len() <= OPTIONS_MAX, || {
        format!("{what}: {} options are more than the {OPTIONS_MAX} allowed", options.len())
    });
    for (name, value) in options.iter().take(OPTIONS_MAX) {
        let Some(kind) = find_rule(table, name) else {
            p.say(format!("{what}: option {} is not known for it", shown(name)));
            continue;
        };
        let fine = match (kind, value) {
            (OptionKind::Switch | OptionKind::OnOffAuto, OptionValue::Switch(_)) => true,
            (OptionKind::OnOffAuto, OptionValue::Word(word)) => word == "auto",
            (OptionKind::Number(min, max), OptionValue::Number(n)) => (min..=max).contains(n),
            (OptionKind::Words(words), OptionValue::Word(word)) => words.contains(&word.as_str()),
            (OptionKind::Text(max), OptionValue::Word(word)) => is_name(word, max),
            _ => false,
        };
        p.unless(fine, || {
            let wanted = match kind {
                OptionKind::Switch => "true or false".to_owned(),
                OptionKind::OnOffAuto => "true, false or \"auto\"".to_owned(),
                OptionKind::Number(min, max) => format!("a number from {min} to {max}"),
                OptionKind::Words(words) => format!("one of {words:?}"),
                OptionKind::Text(max) => format!("at most {max} letters, digits, . _ and -"),
            };
            format!("{what}: option {name} must be {wanted}")
        });
    }
}
