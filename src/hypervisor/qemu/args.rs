//! The command line for a VM. Pure: the same description gives the same line on every host.
//!
//! Invariant: everything the guest can see is written out (addresses, machine version, every
//! device), nothing is left to QEMU's defaults or configuration files; so two hosts that start the
//! same description get the same machine, and the migration stream of one fits the other.
//!
//! A disk's device and its node in QEMU's block graph both have the disk's id as their name; the
//! node sits on top of `ID-file`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::run::RunPaths;
use crate::hypervisor::spec::host::{NetworkBackend, ResolvedVm};
use crate::hypervisor::spec::{
    Accel, CacheMode, Chipset, DeviceModel, DeviceSpec, DiskBus, DiskSpec, ImageFormat,
    OptionValue, Options, PciAddress, Place, RtcBase,
};

/// Id of the character device that the monitor is on.
const MONITOR: &str = "longhaul-qmp";
/// Node names of the flash chips.
const FLASH: [&str; 2] = ["longhaul-flash-code", "longhaul-flash-vars"];
/// Name of the channel on which guest agents listen.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// What a started hypervisor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The guest boots.
    Fresh,
    /// The guest arrives: nothing runs until somebody says so.
    Incoming,
}

/// A command line in the making.
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn option(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }

    fn json(&mut self, flag: &str, value: &Value) {
        self.option(flag, value.to_string());
    }
}

/// A path within a list of options: a comma in it is doubled.
fn escaped(before: &str, path: &Path, after: &str) -> OsString {
    let mut text = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        text.push(byte);
        if byte == b',' {
            text.push(byte);
        }
    }
    text.extend_from_slice(after.as_bytes());
    OsString::from_vec(text)
}

/// The arguments for QEMU, its program's name not included.
pub fn arguments(vm: &ResolvedVm, role: Role, paths: &RunPaths) -> Vec<OsString> {
    let mut line = Line(Vec::new());
    line.option("-name", format!("guest={},debug-threads=on", vm.spec.name));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.option("-display", "none");
    if role == Role::Incoming {
        line.flag("-S");
        line.option("-incoming", "defer");
    }
    board(vm, &mut line);
    line.option(
        "-chardev",
        escaped(&format!("socket,id={MONITOR},path="), &paths.qmp, ",server=on,wait=off"),
    );
    line.option("-mon", format!("chardev={MONITOR},mode=control"));
    line.option("-pidfile", &paths.pid);
    if vm.sandbox {
        line.option("-sandbox", sandbox(vm));
    }
    let root = vm.spec.chipset().map_or("pci.0", Chipset::root_bus);
    // Holders before what they hold: bridges and controllers, then disks and cards, then the rest.
    for device in vm.spec.devices.iter().filter(|d| d.model.place() == Place::Pci) {
        pci_device(device, root, &mut line);
    }
    for (disk, image) in vm.spec.disks.iter().zip(&vm.disks) {
        block_nodes(disk, &image.path, image.is_device, &mut line);
        disk_device(vm, disk, root, &mut line);
    }
    for (nic, backend) in vm.spec.nics.iter().zip(&vm.nics) {
        let net = format!("{}-net", nic.id);
        let mut device = device(nic.model.driver(), &nic.id, &nic.options);
        at(&mut device, nic.slot.as_ref(), root);
        device.insert("mac".into(), json!(nic.mac));
        if *backend != NetworkBackend::None {
            line.option("-netdev", netdev(backend, &net));
            device.insert("netdev".into(), json!(net));
        }
        line.json("-device", &Value::Object(device));
    }
    for device in vm.spec.devices.iter().filter(|d| d.model.place() != Place::Pci) {
        other_device(vm, device, paths, &mut line);
    }
    line.0
}

/// Machine, CPUs, memory, firmware, clock.
fn board(vm: &ResolvedVm, line: &mut Line) {
    let spec = &vm.spec;
    let mut machine = format!("{},accel={}", spec.machine, vm.accel.name());
    for (name, value) in &spec.machine_options {
        machine += &format!(",{name}={}", plain(value));
    }
    if let Some(region) = &spec.memory_region {
        let bytes = spec.memory_mib << 20;
        line.json(
            "-object",
            &json!({ "qom-type": "memory-backend-ram", "id": region, "size": bytes }),
        );
        machine += &format!(",memory-backend={region}");
    }
    if let Some((code, vars)) = &vm.flash {
        for (node, path, read_only) in [(FLASH[0], code, true), (FLASH[1], vars, false)] {
            let file = file_node(path, &format!("{node}-file"), false);
            let format = json!({
                "node-name": node, "driver": "raw", "file": format!("{node}-file"),
                "read-only": read_only
            });
            line.json("-blockdev", &file);
            line.json("-blockdev", &format);
        }
        machine += &format!(",pflash0={},pflash1={}", FLASH[0], FLASH[1]);
    }
    line.option("-machine", machine);
    let mut cpu = spec.cpu.model.clone();
    for (name, value) in &spec.cpu.features {
        cpu += &format!(",{name}={}", plain(value));
    }
    let named = !["host", "max"].contains(&spec.cpu.model.as_str());
    if vm.accel == Accel::Kvm && named && !spec.cpu.features.contains_key("enforce") {
        // Without it QEMU drops what the processor lacks: a guest that arrives would lose
        // instructions it uses. Translation lacks some of every model, at both ends alike.
        cpu += ",enforce=on";
    }
    line.option("-cpu", cpu);
    let mut smp = format!("cpus={}", spec.vcpus);
    if let Some(t) = spec.topology {
        smp += &format!(",sockets={},cores={},threads={}", t.sockets, t.cores, t.threads);
    }
    line.option("-smp", smp);
    line.option("-m", format!("size={}M", spec.memory_mib));
    if let Some(uuid) = &spec.uuid {
        line.option("-uuid", uuid);
    }
    let base = match spec.rtc.base {
        RtcBase::Utc => "utc",
        RtcBase::LocalTime => "localtime",
    };
    let slew = if spec.rtc.slew { ",driftfix=slew" } else { "" };
    line.option("-rtc", format!("base={base}{slew}"));
    if let Some(order) = &spec.boot_order {
        line.option("-boot", format!("order={order}"));
    }
    if spec.no_reboot {
        line.flag("-no-reboot");
    }
    if let (Some(kernel), Some((image, initrd))) = (&spec.kernel, &vm.kernel) {
        line.option("-kernel", image);
        if let Some(initrd) = initrd {
            line.option("-initrd", initrd);
        }
        if !kernel.append.is_empty() {
            line.option("-append", &kernel.append);
        }
    }
}

/// What QEMU may not do. Scripts and helpers of networks must run, the helper with rights of its
/// own; nothing else ever starts a program.
fn sandbox(vm: &ResolvedVm) -> String {
    let helper = vm.nics.iter().any(|n| matches!(n, NetworkBackend::Bridge { .. }));
    let script = vm.nics.iter().any(|n| matches!(n, NetworkBackend::Tap { .. }));
    let allow_if = |allowed: bool| if allowed { "allow" } else { "deny" };
    format!(
        "on,obsolete=deny,resourcecontrol=deny,elevateprivileges={},spawn={}",
        allow_if(helper),
        allow_if(helper || script)
    )
}

/// An option's value as text.
fn plain(value: &OptionValue) -> String {
    match value {
        OptionValue::Switch(true) => "on".to_owned(),
        OptionValue::Switch(false) => "off".to_owned(),
        OptionValue::Number(number) => number.to_string(),
        OptionValue::Word(word) => word.clone(),
    }
}

/// The start of a device's description. Switches that know a third state are words to QEMU.
fn device(driver: &str, id: &str, options: &Options) -> Map<String, Value> {
    const THREE_STATES: [&str; 4] = ["disable-legacy", "write-cache", "msi", "msix"];
    let mut device = Map::new();
    device.insert("driver".into(), json!(driver));
    device.insert("id".into(), json!(id));
    for (name, value) in options {
        let value = match value {
            OptionValue::Switch(on) if !THREE_STATES.contains(&name.as_str()) => json!(on),
            OptionValue::Number(number) => json!(number),
            value => json!(plain(value)),
        };
        device.insert(name.clone(), value);
    }
    device
}

/// Puts a device at its PCI address.
fn at(device: &mut Map<String, Value>, slot: Option<&PciAddress>, root: &str) {
    if let Some(slot) = slot {
        let bus = slot.bridge.as_deref().unwrap_or(root);
        device.insert("bus".into(), json!(bus));
        device.insert("addr".into(), json!(slot.addr()));
    }
}

fn pci_device(spec: &DeviceSpec, root: &str, line: &mut Line) {
    let mut device = device(spec.model.driver(), &spec.id, &spec.options);
    at(&mut device, spec.slot.as_ref(), root);
    if spec.model == DeviceModel::VirtioRng {
        let rng = format!("{}-rng", spec.id);
        line.json("-object", &json!({ "qom-type": "rng-builtin", "id": rng }));
        device.insert("rng".into(), json!(rng));
    }
    line.json("-device", &Value::Object(device));
}

fn file_node(path: &Path, node: &str, is_device: bool) -> Value {
    json!({
        "node-name": node,
        "driver": if is_device { "host_device" } else { "file" },
        // Validated to be text, for descriptions with paths; pools' folders are the operator's.
        "filename": path.to_string_lossy(),
    })
}

fn block_nodes(disk: &DiskSpec, path: &Path, is_device: bool, line: &mut Line) {
    let below = format!("{}-file", disk.id);
    let cache = json!({ "direct": disk.cache == CacheMode::None, "no-flush": false });
    let discard = if disk.discard { "unmap" } else { "ignore" };
    let mut file = file_node(path, &below, is_device);
    file["cache"] = cache.clone();
    file["discard"] = json!(discard);
    file["read-only"] = json!(disk.read_only);
    line.json("-blockdev", &file);
    let driver = match disk.format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    };
    line.json(
        "-blockdev",
        &json!({
            "node-name": disk.id, "driver": driver, "file": below, "cache": cache,
            "discard": discard, "read-only": disk.read_only,
        }),
    );
}

fn disk_device(vm: &ResolvedVm, disk: &DiskSpec, root: &str, line: &mut Line) {
    let mut device = device(disk.bus.driver(), &disk.id, &disk.options);
    device.insert("drive".into(), json!(disk.id));
    if let Some(serial) = &disk.serial {
        device.insert("serial".into(), json!(serial));
    }
    if !device.contains_key("write-cache") {
        let on = disk.cache != CacheMode::WriteThrough;
        device.insert("write-cache".into(), json!(if on { "on" } else { "off" }));
    }
    let unit = disk.unit.unwrap_or_default();
    match (disk.bus, &disk.controller) {
        (DiskBus::Scsi, Some(controller)) => {
            device.insert("bus".into(), json!(format!("{controller}.0")));
            device.insert("scsi-id".into(), json!(unit));
            device.insert("lun".into(), json!(0));
        }
        (DiskBus::VirtioBlk | DiskBus::Scsi, _) => at(&mut device, disk.slot.as_ref(), root),
        (DiskBus::Sata | DiskBus::Ide, _) => at_built_in(vm, &mut device, unit),
    }
    line.json("-device", &Value::Object(device));
}

/// Puts a drive on the machine's own controller: one a bus on SATA, two a bus on IDE.
fn at_built_in(vm: &ResolvedVm, device: &mut Map<String, Value>, unit: u8) {
    let per_bus = if vm.spec.chipset() == Some(Chipset::Q35) { 1 } else { 2 };
    device.insert("bus".into(), json!(format!("ide.{}", unit / per_bus)));
    device.insert("unit".into(), json!(unit % per_bus));
}

fn netdev(backend: &NetworkBackend, id: &str) -> OsString {
    match backend {
        NetworkBackend::Bridge { bridge, helper } => {
            let start = escaped(&format!("bridge,id={id},br="), Path::new(bridge), "");
            match helper {
                Some(helper) => {
                    let mut all = start;
                    all.push(escaped(",helper=", helper, ""));
                    all
                }
                None => start,
            }
        }
        NetworkBackend::Tap { script, down_script, vhost } => {
            let mut all = escaped(&format!("tap,id={id},script="), script, ",downscript=");
            all.push(match down_script {
                Some(down) => escaped("", down, ""),
                None => "no".into(),
            });
            all.push(if *vhost { ",vhost=on" } else { "" });
            all
        }
        NetworkBackend::User { restrict } => {
            let restrict = if *restrict { ",restrict=on" } else { "" };
            format!("user,id={id}{restrict}").into()
        }
        NetworkBackend::None => OsString::new(),
    }
}

fn other_device(vm: &ResolvedVm, spec: &DeviceSpec, paths: &RunPaths, line: &mut Line) {
    let mut device = device(spec.model.driver(), &spec.id, &spec.options);
    let bus = spec.controller.as_ref().map(|controller| format!("{controller}.0"));
    match spec.model {
        DeviceModel::Serial => {
            let chardev = format!("{}-chr", spec.id);
            let position = vm.spec.devices.iter().filter(|d| d.model == DeviceModel::Serial);
            let nth = position.take_while(|d| d.id != spec.id).count();
            let mut value = escaped(
                &format!("socket,id={chardev},path="),
                &paths.serial_socket(nth),
                ",server=on,wait=off",
            );
            value.push(escaped(",logfile=", &paths.serial_log(nth), ",logappend=on"));
            line.option("-chardev", value);
            device.insert("chardev".into(), json!(chardev));
        }
        DeviceModel::GuestAgent => {
            let chardev = format!("{}-chr", spec.id);
            line.option(
                "-chardev",
                escaped(
                    &format!("socket,id={chardev},path="),
                    &paths.guest_agent,
                    ",server=on,wait=off",
                ),
            );
            device.insert("chardev".into(), json!(chardev));
            device.insert("name".into(), json!(AGENT_CHANNEL));
            device.insert("bus".into(), json!(bus));
            if let Some(unit) = spec.unit {
                device.insert("nr".into(), json!(unit));
            }
        }
        DeviceModel::EmptyCdrom => at_built_in(vm, &mut device, spec.unit.unwrap_or_default()),
        _ => {
            if let Some(bus) = bus {
                device.insert("bus".into(), json!(bus));
            }
            if let Some(unit) = spec.unit {
                device.insert("port".into(), json!(unit.to_string()));
            }
        }
    }
    line.json("-device", &Value::Object(device));
}

#[cfg(test)]
mod tests;
