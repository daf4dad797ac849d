//! Machine, CPUs, memory, firmware and clock of an adopted VM, and the options that only concern
//! its host. Pure.

use std::path::Path;

use super::Observed;
use super::cmdline::{Opt, Props, as_number, as_switch};
use super::describe::{Findings, location};
use crate::hypervisor::spec::host::HostPolicy;
use crate::hypervisor::spec::models::{self, OptionKind, OptionTable, find_rule};
use crate::hypervisor::spec::{
    FirmwareSpec, KernelSpec, OptionValue, Options, RtcBase, Topology, VmSpec,
};

/// Options that only say how the host looks after the VM, and those that are read elsewhere.
const OF_THE_HOST: [&str; 46] = [
    "D",
    "L",
    "S",
    "add-fd",
    "audiodev",
    "blockdev",
    "cdrom",
    "chardev",
    "chroot",
    "curses",
    "d",
    "daemonize",
    "device",
    "display",
    "drive",
    "enable-kvm",
    "full-screen",
    "g",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "incoming",
    "k",
    "mem-path",
    "mem-prealloc",
    "mon",
    "monitor",
    "msg",
    "netdev",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "only-migratable",
    "overcommit",
    "parallel",
    "pidfile",
    "qmp",
    "qmp-pretty",
    "run-with",
    "runas",
    "sandbox",
    "serial",
    "trace",
    "vnc",
];

/// The value of an option by its rule, if it fits.
pub(super) fn option_value(kind: OptionKind, text: &str) -> Option<OptionValue> {
    match kind {
        OptionKind::Switch => as_switch(text).map(OptionValue::Switch),
        OptionKind::OnOffAuto if text == "auto" => Some(OptionValue::Word(text.to_owned())),
        OptionKind::OnOffAuto => as_switch(text).map(OptionValue::Switch),
        OptionKind::Number(min, max) => {
            as_number(text).filter(|n| (min..=max).contains(n)).map(OptionValue::Number)
        }
        OptionKind::Words(words) => {
            words.contains(&text).then(|| OptionValue::Word(text.to_owned()))
        }
        OptionKind::Text(max) => (text.len() <= max).then(|| OptionValue::Word(text.to_owned())),
    }
}

/// Takes what `table` knows out of `props`; what is left over is told.
pub(super) fn take_options(
    what: &str,
    props: Props,
    table: OptionTable,
    findings: &mut Findings,
) -> Options {
    let mut options = Options::new();
    for (key, text) in props.rest() {
        match find_rule(table, &key).and_then(|kind| option_value(kind, &text)) {
            Some(value) => drop(options.insert(key, value)),
            None => findings.unknown(format!("{what}: option {key}={text} is not understood")),
        }
    }
    options
}

/// Reads one option that is about the board or the host.
pub(super) fn read_option(
    option: &Opt,
    spec: &mut VmSpec,
    observed: &Observed,
    policy: &HostPolicy,
    findings: &mut Findings,
) {
    let value = option.value.as_deref().unwrap_or_default();
    let parse = |implied: &str, findings: &mut Findings| match Props::parse(value, implied) {
        Ok(props) => props,
        Err(e) => {
            findings.unknown(format!("-{} {value} is not understood: {e}", option.name));
            Props::default()
        }
    };
    match option.name.as_str() {
        "machine" | "M" => machine(parse("type", findings), spec, findings),
        "accel" => {
            let mut props = parse("accel", findings);
            props.drop_all(&["accel", "thread", "tb-size", "split-wx", "dirty-ring-size"]);
            report("-accel", props, findings);
        }
        "cpu" => cpu(value, spec),
        "smp" => smp(parse("cpus", findings), observed, findings),
        "m" => {
            let mut props = parse("size", findings);
            props.drop_all(&["size"]);
            report("-m", props, findings);
        }
        "rtc" => rtc(parse("base", findings), spec, findings),
        "boot" => boot(parse("order", findings), spec, findings),
        "name" => {
            let mut props = parse("guest", findings);
            props.drop_all(&["debug-threads", "process"]);
            if let Some(own) = props.take("guest").filter(|own| *own != spec.name) {
                findings.note(format!("its own name is {own:?}, it is adopted as {}", spec.name));
            }
            report("-name", props, findings);
        }
        "uuid" => {}
        "no-reboot" => spec.no_reboot = true,
        "no-hpet" => drop(spec.machine_options.insert("hpet".into(), OptionValue::Switch(false))),
        "no-acpi" => drop(spec.machine_options.insert("acpi".into(), OptionValue::Switch(false))),
        "usb" => drop(spec.machine_options.insert("usb".into(), OptionValue::Switch(true))),
        "kernel" | "initrd" => kernel(&option.name, value, spec, observed, policy),
        "append" => {
            if let Some(kernel) = &mut spec.kernel {
                kernel.append = value.to_owned();
            } else {
                findings.unknown("-append comes before -kernel".to_owned());
            }
        }
        "object" => object(parse("qom-type", findings), spec, findings),
        "action" | "watchdog-action" => {
            findings.note(format!("-{} {value} is not carried over", option.name));
        }
        "net" | "nic" | "vga" if value == "none" => {}
        // Display and cards are found among the devices that the machine made.
        "vga" | "nic" | "net" => {}
        "" => findings.unknown(format!("{value} stands alone on the command line")),
        name if OF_THE_HOST.contains(&name) => {}
        name => findings.unknown(format!("-{name} {value} is not understood")),
    }
}

fn report(what: &str, props: Props, findings: &mut Findings) {
    for (key, value) in props.rest() {
        findings.unknown(format!("{what}: {key}={value} is not understood"));
    }
}

fn machine(mut props: Props, spec: &mut VmSpec, findings: &mut Findings) {
    // The type and the accelerator are asked of QEMU itself.
    props.drop_all(&["type", "accel", "dump-guest-core", "mem-merge", "memory-backend"]);
    // Firmware is found among the disks.
    props.drop_all(&["pflash0", "pflash1"]);
    for off_by_default in ["nvdimm", "hmat", "suppress-vmdesc"] {
        if props.get(off_by_default).and_then(as_switch) == Some(false) {
            props.drop_all(&[off_by_default]);
        }
    }
    if let Some(chip) = props.take("kernel_irqchip")
        && let Some(value) = option_value(OptionKind::Words(&["on", "off", "split"]), &chip)
    {
        spec.machine_options.insert("kernel-irqchip".into(), value);
    }
    let options = take_options("the machine", props, models::MACHINE, findings);
    spec.machine_options.extend(options);
}

/// Reads features: `name=value`, `+name`, `-name`. The model itself is asked of QEMU.
fn cpu(value: &str, spec: &mut VmSpec) {
    for part in value.split(',').skip(1).filter(|part| !part.is_empty()) {
        let (name, value) = match (part.split_once('='), part.strip_prefix('-')) {
            (Some((name, value)), _) => (name, value),
            (None, Some(name)) => (name, "off"),
            (None, None) => (part.strip_prefix('+').unwrap_or(part), "on"),
        };
        let value = match (as_switch(value), as_number(value)) {
            (Some(on), _) => OptionValue::Switch(on),
            (None, Some(number)) => OptionValue::Number(number),
            (None, None) => OptionValue::Word(value.to_owned()),
        };
        spec.cpu.features.insert(name.to_owned(), value);
    }
}

fn smp(mut props: Props, observed: &Observed, findings: &mut Findings) {
    // How CPUs are arranged is asked of QEMU; but room for more of them is not in a description.
    let cpus = observed.cpus.len() as u64;
    let max = props.take("maxcpus").as_deref().and_then(as_number);
    if max.is_some_and(|max| max != cpus) {
        findings.unknown("-smp: CPUs can be added while it runs (maxcpus)".to_owned());
    }
    props.drop_all(&["cpus", "sockets", "cores", "threads"]);
    for level in ["dies", "clusters", "modules", "books", "drawers"] {
        if props.get(level) == Some("1") {
            props.drop_all(&[level]);
        }
    }
    report("-smp", props, findings);
}

/// How CPUs are arranged, by what QEMU says of each.
pub(super) fn topology(observed: &Observed) -> Option<Topology> {
    let most = |key: &str| -> Option<u32> {
        let ids = observed.cpus.iter().map(|cpu| cpu["props"][key].as_u64());
        u32::try_from(ids.collect::<Option<Vec<_>>>()?.into_iter().max()?.checked_add(1)?).ok()
    };
    let (sockets, cores, threads) = (most("socket-id")?, most("core-id")?, most("thread-id")?);
    let product = sockets.checked_mul(cores)?.checked_mul(threads)?;
    (usize::try_from(product).ok()? == observed.cpus.len()).then_some(Topology {
        sockets,
        cores,
        threads,
    })
}

fn rtc(mut props: Props, spec: &mut VmSpec, findings: &mut Findings) {
    match props.take("base").as_deref() {
        None | Some("utc") => {}
        Some("localtime") => spec.rtc.base = RtcBase::LocalTime,
        Some(date) => findings.note(format!(
            "its clock was set to {date} at its start: that runs on, but a new start shows the \
             real time"
        )),
    }
    spec.rtc.slew = props.take("driftfix").as_deref() == Some("slew");
    if props.get("clock") == Some("host") {
        props.drop_all(&["clock"]);
    }
    report("-rtc", props, findings);
}

fn boot(mut props: Props, spec: &mut VmSpec, findings: &mut Findings) {
    spec.boot_order = props.take("order");
    for (key, value) in props.rest() {
        findings.note(format!("-boot {key}={value} is not carried over; it matters at boot only"));
    }
}

fn kernel(option: &str, value: &str, spec: &mut VmSpec, observed: &Observed, policy: &HostPolicy) {
    let file = location(&observed.cwd.join(value), policy);
    let kernel = spec.kernel.get_or_insert_with(|| KernelSpec {
        kernel: file.clone(),
        initrd: None,
        append: String::new(),
    });
    if option == "kernel" {
        kernel.kernel = file;
    } else {
        kernel.initrd = Some(file);
    }
}

fn object(mut props: Props, spec: &mut VmSpec, findings: &mut Findings) {
    let kind = props.take("qom-type").unwrap_or_default();
    let id = props.take("id").unwrap_or_default();
    match kind.as_str() {
        // What feeds entropy to the guest is the host's affair.
        "rng-random" | "rng-builtin" | "rng-egd" => {}
        "iothread" | "secret" | "tls-creds-x509" | "tls-creds-psk" | "tls-creds-anon"
        | "authz-simple" | "authz-list" | "main-loop" | "throttle-group" => {
            findings.note(format!("{kind} {id} is not carried over"));
        }
        "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-file" => {
            if spec.memory_region.replace(id.clone()).is_some() {
                findings.unknown(format!("{kind} {id}: its memory has several parts"));
            }
        }
        _ => findings.unknown(format!("object {id} of type {kind} is not understood")),
    }
}

/// Firmware in flash, from the block devices behind the machine's flash chips.
pub(super) fn firmware(
    spec: &mut VmSpec,
    observed: &Observed,
    policy: &HostPolicy,
    findings: &mut Findings,
) {
    let chip = |nth: &str| {
        let is_it =
            |block: &&serde_json::Value| block["qdev"].as_str().is_some_and(|q| q.ends_with(nth));
        observed.blocks.iter().find(is_it).map(|block| &block["inserted"])
    };
    let (code, vars) = match (chip("system.flash0"), chip("system.flash1")) {
        (None, None) => return,
        (Some(code), Some(vars)) => (code, vars),
        _ => {
            findings.unknown("its firmware is in one flash chip with its variables".to_owned());
            return;
        }
    };
    let file =
        |chip: &serde_json::Value| chip["image"]["filename"].as_str().map(|f| observed.cwd.join(f));
    let (Some(code), Some(file), Some(vars_bytes), Some("raw")) =
        (file(code), file(vars), vars["image"]["virtual-size"].as_u64(), vars["drv"].as_str())
    else {
        findings.unknown("its flash is not in plain raw files".to_owned());
        return;
    };
    let known = policy.firmware.iter().find(|(_, path)| **path == code);
    let name = known.map(|(name, _)| name.clone()).unwrap_or_else(|| stem(&code));
    findings.note(format!(
        "its firmware {} is called {name}: the target's configuration must have the same file \
         under that name",
        code.display()
    ));
    spec.firmware = FirmwareSpec::Uefi { code: name, vars: location(&file, policy), vars_bytes };
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}
