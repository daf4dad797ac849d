//! From everything that QEMU tells of itself to a description. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::board::{self, take_options};
use super::cmdline::{self, Props};
use super::disks::{self, Backends, Seat, Sources, block_of, built_in};
use super::names::{Ids, Kind, canonical, is_chipset, kind_of};
use super::{Adopted, Observed, Origin, QomDevice};
use crate::hypervisor::qemu::run::Process;
use crate::hypervisor::spec::host::{HostPolicy, NetworkBackend};
use crate::hypervisor::spec::validate::printable;
use crate::hypervisor::spec::{
    Accel, CpuSpec, DeviceModel, DeviceSpec, DiskBus, ImageLocation, NetworkKind, NicModel,
    NicSpec, Options, PciAddress, Place, VmSpec,
};

/// Most findings of a kind that are kept; one more says that there were others.
const FINDINGS_MAX: usize = 200;
/// The channel on which guest agents listen.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// What is found on the way.
#[derive(Debug, Default)]
pub(super) struct Findings {
    not_understood: Vec<String>,
    notes: Vec<String>,
}

impl Findings {
    pub(super) fn unknown(&mut self, what: String) {
        push(&mut self.not_understood, &what);
    }

    pub(super) fn note(&mut self, what: String) {
        push(&mut self.notes, &what);
    }
}

fn push(list: &mut Vec<String>, what: &str) {
    match list.len() {
        n if n < FINDINGS_MAX => list.push(printable(what)),
        FINDINGS_MAX => list.push("and more than can be listed".to_owned()),
        _ => {}
    }
}

/// Where a device was found to be.
#[derive(Debug, Default)]
pub(super) struct Placed {
    pub(super) slot: Option<PciAddress>,
    pub(super) controller: Option<String>,
    pub(super) unit: Option<u8>,
}

/// A file by its pool, if it lies directly in one, else by its path.
pub(super) fn location(path: &Path, policy: &HostPolicy) -> ImageLocation {
    let pool = policy.pools.iter().find(|(_, dir)| {
        path.parent().is_some_and(|parent| {
            parent == dir.as_path() || dir.canonicalize().is_ok_and(|dir| dir == parent)
        })
    });
    match (pool, path.file_name().and_then(|f| f.to_str())) {
        (Some((pool, _)), Some(file)) => {
            ImageLocation::Pool { pool: pool.clone(), file: file.to_owned() }
        }
        _ => ImageLocation::Path { path: path.to_owned() },
    }
}

/// Ids of devices by their path in QEMU's tree, for those that hang on them.
type Holders = BTreeMap<String, String>;

pub(super) fn describe(
    observed: &Observed,
    name: &str,
    policy: &HostPolicy,
    process: Process,
) -> Adopted {
    let mut findings = Findings::default();
    let (_, options) = cmdline::split(&observed.words);
    let mut spec = VmSpec {
        name: name.to_owned(),
        uuid: observed.uuid.clone(),
        machine: observed.machine.clone(),
        accel: Some(if observed.kvm { Accel::Kvm } else { Accel::Tcg }),
        vcpus: u32::try_from(observed.cpus.len()).unwrap_or(u32::MAX),
        memory_mib: observed.memory_bytes >> 20,
        memory_region: None,
        boot_order: None,
        no_reboot: false,
        rtc: Default::default(),
        cpu: CpuSpec { model: observed.cpu.clone(), features: Options::new() },
        topology: board::topology(observed),
        machine_options: Options::new(),
        firmware: Default::default(),
        kernel: None,
        disks: Vec::new(),
        nics: Vec::new(),
        devices: Vec::new(),
    };
    if !observed.memory_bytes.is_multiple_of(1 << 20) {
        findings.unknown("its memory is no whole number of MiB".to_owned());
    }
    if observed.too_many {
        findings.unknown("it has more devices than are looked at".to_owned());
    }
    let mut asked: Vec<Option<Props>> = Vec::new();
    // QEMU makes the devices that are written as JSON after all the others.
    let is_json = |option: &&cmdline::Opt| {
        option.value.as_deref().is_some_and(|value| value.starts_with('{'))
    };
    let (json, plain): (Vec<_>, Vec<_>) = options.iter().partition(is_json);
    for option in plain.into_iter().chain(json) {
        let value = option.value.as_deref().unwrap_or_default();
        if option.name == "device" {
            match Props::parse(value, "driver") {
                Ok(props) => asked.push(Some(props)),
                Err(e) => findings.unknown(format!("-device {value} is not understood: {e}")),
            }
        } else {
            board::read_option(option, &mut spec, observed, policy, &mut findings);
        }
    }
    board::firmware(&mut spec, observed, policy, &mut findings);
    let backends = Backends::read(&options, &mut findings);
    let networks = Networks::read(&options, policy, &mut findings);
    let mut builder = Builder {
        observed,
        policy,
        backends,
        networks,
        ids: Ids::default(),
        holders: Holders::new(),
        spec,
        findings,
    };
    builder.all(&mut asked);
    let Builder { mut spec, findings, .. } = builder;
    // Ports and bridges first, as descriptions have them; the order is kept otherwise.
    spec.devices.sort_by_key(|d| !d.model.is_bridge());
    Adopted { spec, not_understood: findings.not_understood, notes: findings.notes, process }
}

/// What netdevs the command line has, by their ids.
struct Networks {
    by_id: BTreeMap<String, (NetworkKind, String)>,
    /// Of cards that came without a netdev of their own.
    of_cards: Vec<(NetworkKind, String)>,
}

impl Networks {
    fn read(options: &[cmdline::Opt], policy: &HostPolicy, findings: &mut Findings) -> Self {
        let mut all = Self { by_id: BTreeMap::new(), of_cards: Vec::new() };
        let mut legacy = false;
        for option in options {
            let value = option.value.as_deref().unwrap_or_default();
            let is_nic = option.name == "nic";
            legacy |= option.name == "net" && value != "none";
            if !is_nic && option.name != "netdev" {
                continue;
            }
            let mut props = match Props::parse(value, "type") {
                Ok(props) => props,
                Err(e) => {
                    findings.unknown(format!("-{} {value}: {e}", option.name));
                    continue;
                }
            };
            let kind = props.take("type").unwrap_or_default();
            if is_nic && kind == "none" {
                continue;
            }
            let network = known_network(&kind, &props, policy);
            let entry = match kind.as_str() {
                "user" => (NetworkKind::User, network),
                "tap" | "bridge" => (NetworkKind::Tap, network),
                _ => {
                    findings.unknown(format!("-{} {value}: its kind is not known", option.name));
                    continue;
                }
            };
            if is_nic {
                all.of_cards.push(entry);
            } else {
                all.by_id.insert(props.take("id").unwrap_or_default(), entry);
            }
        }
        let with_default = !options
            .iter()
            .any(|o| ["nic", "net", "netdev", "nodefaults"].contains(&o.name.as_str()));
        if with_default {
            all.of_cards
                .push((NetworkKind::User, known_network("user", &Props::default(), policy)));
        }
        if legacy {
            findings.unknown("-net is not understood: use -nic or -netdev".to_owned());
        }
        all
    }
}

/// The host's name for a network like this, else one that tells what it is.
fn known_network(kind: &str, props: &Props, policy: &HostPolicy) -> String {
    let like = |backend: &NetworkBackend| match backend {
        NetworkBackend::Bridge { bridge, .. } => {
            kind == "bridge" && props.get("br").unwrap_or("br0") == bridge
        }
        NetworkBackend::Tap { script, .. } => {
            kind == "tap" && props.get("script").is_some_and(|s| Path::new(s) == script)
        }
        NetworkBackend::User { .. } => kind == "user",
        NetworkBackend::None => false,
    };
    let known = policy.networks.iter().find(|(_, backend)| like(backend));
    match (known, props.get("br")) {
        (Some((name, _)), _) => name.clone(),
        (None, Some(bridge)) => bridge.to_owned(),
        (None, None) => kind.to_owned(),
    }
}

struct Builder<'a> {
    observed: &'a Observed,
    policy: &'a HostPolicy,
    backends: Backends,
    networks: Networks,
    ids: Ids,
    holders: Holders,
    spec: VmSpec,
    findings: Findings,
}

impl Builder<'_> {
    fn all(&mut self, asked: &mut [Option<Props>]) {
        // Ids first, so that what hangs on a device can name it whatever the order.
        let mut found: Vec<(&QomDevice, Props, String)> = Vec::new();
        for device in &self.observed.devices {
            if device.origin == Origin::Machine && is_chipset(&device.driver) {
                continue;
            }
            let props = self.props_of(device, asked);
            let own = device.path.strip_prefix("/machine/peripheral/");
            let id = self.ids.give(own, base_of(&device.driver));
            self.holders.insert(device.path.clone(), id.clone());
            found.push((device, props, id));
        }
        for (device, props, id) in found {
            self.one(device, props, id);
        }
        for props in asked.iter_mut().filter_map(Option::take) {
            let driver = props.get("driver").unwrap_or_default().to_owned();
            let id = props.get("id").unwrap_or("without id").to_owned();
            self.findings.note(format!("device {id} ({driver}) is not there any more"));
        }
    }

    /// The options that a device was asked for with.
    fn props_of(&mut self, device: &QomDevice, asked: &mut [Option<Props>]) -> Props {
        let own = device.path.strip_prefix("/machine/peripheral/");
        let block = block_of(self.observed, device);
        let drive = block.and_then(|b| b["device"].as_str()).unwrap_or_default();
        let node = block.and_then(|b| b["inserted"]["node-name"].as_str()).unwrap_or_default();
        let is_it = |props: &Props| {
            let driver = props.get("driver").map(canonical);
            let of_block = props.get("drive").is_none_or(|d| d == drive || d == node);
            match (own, props.get("id")) {
                (Some(own), Some(id)) => own == id,
                (None, None) => driver == Some(device.driver.as_str()) && of_block,
                _ => false,
            }
        };
        if device.origin == Origin::Machine {
            return Props::default();
        }
        let position = asked.iter().position(|p| p.as_ref().is_some_and(is_it));
        if let Some(props) = position.and_then(|i| asked[i].take()) {
            return props;
        }
        let own_drive = device.origin == Origin::Nameless && self.backends.made_by_drive(drive);
        if !own_drive {
            self.findings.unknown(format!(
                "device {} ({}) was added while it ran: with which options is not known",
                own.unwrap_or(&device.path),
                device.driver
            ));
        }
        Props::default()
    }

    fn one(&mut self, device: &QomDevice, props: Props, id: String) {
        match kind_of(&device.driver) {
            Kind::Disk(bus) => self.disk(device, props, id, bus),
            Kind::Cdrom => self.cdrom(device, props, id),
            Kind::Nic(model) => self.nic(device, props, id, model),
            Kind::Device(model) => self.device(device, props, id, model),
            Kind::Unknown => {
                let by = if device.origin == Origin::Machine {
                    " that the machine made by itself (without -nodefaults it does)"
                } else {
                    ""
                };
                self.findings
                    .unknown(format!("device {id} of type {}{by} is not known", device.driver));
            }
        }
    }

    /// The device that holds the bus of another one. Paravirtual ones keep theirs a level deeper.
    fn holder(&self, device: &QomDevice) -> Option<&String> {
        let parents = std::iter::successors(Some(device.bus.as_str()), |path| {
            path.rsplit_once('/').map(|(parent, _)| parent)
        });
        parents.skip(1).find_map(|parent| self.holders.get(parent))
    }

    /// The PCI address of a device; a finding if it is on a bus that is not known.
    fn slot(&mut self, device: &QomDevice, what: &str) -> Option<PciAddress> {
        let devfn = device.devfn.unwrap_or_default();
        let on_root = matches!(device.bus.rsplit('/').next(), Some("pci.0" | "pcie.0"));
        let bridge = self.holder(device).cloned();
        if bridge.is_none() && !on_root {
            self.findings.unknown(format!("{what}: its bus {} is not known", device.bus));
            return None;
        }
        Some(PciAddress { bridge, slot: devfn >> 3, function: devfn & 7 })
    }

    fn disk(&mut self, device: &QomDevice, props: Props, id: String, bus: DiskBus) {
        let what = format!("disk {id}");
        let seat = match bus {
            DiskBus::VirtioBlk => {
                let slot = self.slot(device, &what);
                Seat { bus, placed: Placed { slot, ..Placed::default() } }
            }
            DiskBus::Scsi => {
                let lun = props.get("lun").unwrap_or("0");
                let controller = self.holder(device).cloned();
                if controller.is_none() || lun != "0" {
                    self.findings.unknown(format!("{what}: its place on SCSI is not known"));
                }
                Seat { bus, placed: Placed { slot: None, controller, unit: device.unit } }
            }
            DiskBus::Sata | DiskBus::Ide => match built_in(self.spec.chipset(), device) {
                Some((bus, unit)) => {
                    Seat { bus, placed: Placed { unit: Some(unit), ..Placed::default() } }
                }
                None => {
                    self.findings.unknown(format!("{what}: its controller is not known"));
                    return;
                }
            },
        };
        let sources =
            Sources { observed: self.observed, backends: &self.backends, policy: self.policy };
        let disk = disks::disk(id, device, props, seat, &sources, &mut self.findings);
        self.spec.disks.extend(disk);
    }

    fn cdrom(&mut self, device: &QomDevice, mut props: Props, id: String) {
        let what = format!("CD drive {id}");
        let disc = block_of(self.observed, device).is_some_and(|b| b["inserted"] != Value::Null);
        let place = built_in(self.spec.chipset(), device);
        match (disc, place) {
            (true, _) => self.findings.unknown(format!("{what}: there is a disc in it: eject it")),
            (false, None) => self.findings.unknown(format!("{what}: its controller is not known")),
            (false, Some((_, unit))) => {
                props.drop_all(&["driver", "id", "bus", "unit", "drive", "werror", "rerror"]);
                let model = DeviceModel::EmptyCdrom;
                let options = take_options(&what, props, model.options(), &mut self.findings);
                let unit = Some(unit);
                let device = DeviceSpec { id, model, slot: None, controller: None, unit, options };
                self.spec.devices.push(device);
            }
        }
    }

    fn nic(&mut self, device: &QomDevice, mut props: Props, id: String, model: NicModel) {
        let what = format!("network card {id}");
        let slot = self.slot(device, &what);
        let behind = match props.take("netdev") {
            Some(netdev) => self.networks.by_id.get(&netdev).cloned(),
            None if device.origin == Origin::Machine && !self.networks.of_cards.is_empty() => {
                Some(self.networks.of_cards.remove(0))
            }
            None => Some((NetworkKind::None, "none".to_owned())),
        };
        let Some((backend, network)) = behind else {
            self.findings.unknown(format!("{what}: what is behind it is not known"));
            return;
        };
        let Some(mac) = device.mac.clone() else {
            self.findings.unknown(format!("{what}: QEMU does not tell its address"));
            return;
        };
        props.drop_all(&["driver", "id", "bus", "addr", "mac"]);
        let options = take_options(&what, props, model.options(), &mut self.findings);
        let backend = Some(backend);
        self.spec.nics.push(NicSpec { id, model, mac, network, backend, slot, options });
    }

    fn device(&mut self, device: &QomDevice, mut props: Props, id: String, model: DeviceModel) {
        let what = format!("device {id}");
        let mut placed = Placed::default();
        match model.place() {
            Place::Pci => placed.slot = self.slot(device, &what),
            Place::Usb | Place::Channel => {
                placed.controller = self.holder(device).cloned();
                placed.unit = if model.place() == Place::Usb { device.port } else { device.unit };
                if placed.controller.is_none() {
                    self.findings.unknown(format!("{what}: its controller is not known"));
                }
            }
            Place::Isa | Place::Drive | Place::Nowhere => {}
        }
        if model == DeviceModel::GuestAgent {
            let name = props.take("name").unwrap_or_default();
            if name != AGENT_CHANNEL {
                self.findings.unknown(format!("{what}: channel {name:?} is not known"));
                return;
            }
        }
        props.drop_all(&["driver", "id", "bus", "addr", "chardev", "rng", "nr"]);
        if model.place() == Place::Usb {
            // Elsewhere it is an option, of root ports, and no place.
            props.drop_all(&["port"]);
        }
        let options = take_options(&what, props, model.options(), &mut self.findings);
        let Placed { slot, controller, unit } = placed;
        self.spec.devices.push(DeviceSpec { id, model, slot, controller, unit, options });
    }
}

/// What ids of devices begin with that have none of their own.
fn base_of(driver: &str) -> &'static str {
    match kind_of(driver) {
        Kind::Disk(_) => "disk",
        Kind::Cdrom => "cdrom",
        Kind::Nic(_) => "net",
        Kind::Device(DeviceModel::Serial) => "serial",
        Kind::Device(DeviceModel::Vga | DeviceModel::Cirrus | DeviceModel::VirtioVga) => "vga",
        Kind::Device(_) | Kind::Unknown => "device",
    }
}
