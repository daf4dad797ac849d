//! Descriptions: as people write them, and as enemies do.

use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::host::{AccelPreference, HostPolicy, NetworkBackend, resolve, resolve_own};
use super::*;

/// A description with a bit of everything.
pub(crate) const WEB1: &str = r#"
name = "web1"
uuid = "6e1f3c1e-5f3c-4d2a-9a1b-0c2d4e6f8a0b"
machine = "pc-q35-7.2"
vcpus = 2
memory_mib = 1024

[cpu]
model = "qemu64"
features = { avx = false }

[machine_options]
vmport = false

[[disks]]
id = "system"
location = { pool = "default", file = "web1.qcow2" }
format = "qcow2"
bus = "virtio-blk"
cache = "none"
discard = true
serial = "WEB1"
options = { bootindex = 1, disable-legacy = true }

[[disks]]
id = "data"
location = { path = "/srv/web1,data.raw" }
format = "raw"
bus = "scsi"
controller = "scsi0"

[[nics]]
id = "net0"
model = "virtio-net"
mac = "52:54:00:aa:bb:01"
network = "lan"
slot = "0a.0"

[[devices]]
id = "scsi0"
model = "virtio-scsi"

[[devices]]
id = "port1"
model = "pcie-root-port"
options = { chassis = 1 }

[[devices]]
id = "rng0"
model = "virtio-rng"
slot = "port1:00.0"

[[devices]]
id = "usb"
model = "xhci"

[[devices]]
id = "tablet"
model = "usb-tablet"
controller = "usb"

[[devices]]
id = "serial0"
model = "serial"
"#;

pub(crate) fn web1() -> VmSpec {
    toml::from_str(WEB1).unwrap()
}

fn problems(change: impl FnOnce(&mut VmSpec)) -> String {
    let mut spec = web1();
    change(&mut spec);
    spec.validate().unwrap_err().join("; ")
}

#[test]
fn a_description_survives_toml_and_json() {
    let spec = web1();
    spec.validate().unwrap();
    let text = toml::to_string(&spec).unwrap();
    assert_eq!(toml::from_str::<VmSpec>(&text).unwrap(), spec);
    let json = serde_json::to_vec(&spec).unwrap();
    assert_eq!(serde_json::from_slice::<VmSpec>(&json).unwrap(), spec);
}

#[test]
fn unknown_fields_are_refused_everywhere() {
    for (field, within) in [
        ("color = 1", "name = "),
        ("color = 1", "model = \"qemu64\""),
        ("color = 1", "id = \"system\""),
        ("color = 1", "id = \"net0\""),
        ("color = 1", "id = \"rng0\""),
    ] {
        let text = WEB1.replacen(within, &format!("{field}\n{within}"), 1);
        assert!(toml::from_str::<VmSpec>(&text).is_err(), "{within}");
    }
    let both = WEB1.replacen("{ pool =", "{ path = \"/x\", pool =", 1);
    assert!(toml::from_str::<VmSpec>(&both).is_err());
}

#[test]
fn an_alias_is_refused_with_the_versioned_name() {
    for (alias, name) in [("q35", "pc-q35-7.2"), ("pc", "pc-i440fx-7.2")] {
        assert!(problems(|s| s.machine = alias.into()).contains(name));
    }
    for bad in ["microvm", "pc-q35-", "pc-q35-7.2,accel=kvm", "none", ""] {
        assert!(problems(|s| s.machine = bad.into()).contains("is not known"), "{bad}");
    }
    for good in ["pc-q35-rhel9.2.0", "pc-q35-jammy", "pc-q35-8.1+pve0"] {
        let mut spec = web1();
        spec.machine = good.into();
        spec.validate().unwrap();
    }
}

#[test]
fn what_an_enemy_writes_is_refused_with_a_reason() {
    type Change = fn(&mut VmSpec);
    let cases: [(Change, &str); 27] = [
        (|s| s.name = "../x".into(), "name"),
        (|s| s.name = "a,process=b".into(), "name"),
        (|s| s.name = "-x".into(), "name"),
        (|s| s.name = "x".repeat(65), "name"),
        (|s| s.vcpus = 0, "vcpus"),
        (|s| s.vcpus = u32::MAX, "vcpus"),
        (|s| s.memory_mib = u64::MAX, "memory_mib"),
        (|s| s.memory_region = Some("a,b".into()), "memory_region"),
        (|s| s.cpu.model = "host,+x".into(), "cpu model"),
        (|s| drop(s.cpu.features.insert("a=b".into(), OptionValue::Switch(true))), "cpu feature"),
        (
            |s| drop(s.cpu.features.insert("a".into(), OptionValue::Word("b,c".into()))),
            "plain word",
        ),
        (|s| s.disks[0].id = "longhaul-x".into(), "id"),
        (|s| s.disks[0].id = "net0".into(), "taken"),
        (|s| s.disks[0].serial = Some("a,file=b".into()), "serial"),
        (
            |s| drop(s.disks[0].options.insert("romfile".into(), OptionValue::Word("/etc".into()))),
            "must be one of",
        ),
        (
            |s| drop(s.nics[0].options.insert("script".into(), OptionValue::Word("x".into()))),
            "not known for it",
        ),
        (
            |s| drop(s.disks[0].options.insert("bootindex".into(), OptionValue::Number(10_000))),
            "a number from 0 to 9999",
        ),
        (|s| s.disks[1].controller = Some("rng0".into()), "virtio-scsi"),
        (|s| s.disks[1].bus = DiskBus::Ide, "no such controller"),
        (|s| s.nics[0].mac = "01:00:5e:00:00:01".into(), "mac"),
        (|s| s.nics[0].network = "lan,script=x".into(), "network"),
        (|s| s.nics[0].slot = Some(PciAddress::root(0, 0)), "belongs to the machine"),
        (|s| s.nics[0].slot = s.devices[2].slot.clone(), "same slot"),
        (|s| s.devices.swap(1, 2), "before it"),
        (|s| s.devices[4].controller = None, "qemu-xhci"),
        (
            |s| {
                s.firmware = FirmwareSpec::Uefi {
                    code: "../ovmf".into(),
                    vars: s.disks[0].location.clone(),
                    vars_bytes: 1,
                }
            },
            "same file",
        ),
        (|s| s.disks = vec![s.disks[0].clone(); 33], "33 disks"),
    ];
    for (i, (change, reason)) in cases.into_iter().enumerate() {
        let said = problems(change);
        assert!(said.contains(reason), "case {i}: {said}");
    }
    for file in ["", ".", "..", "../x", "/etc/passwd", "a/b", ".hidden", "a,b", "a:b", "a\0", "\n"]
    {
        let said = problems(|s| {
            s.disks[0].location = ImageLocation::Pool { pool: "default".into(), file: file.into() }
        });
        assert!(said.contains("plain file name"), "{file:?}: {said}");
    }
}

#[test]
fn wire_form_is_complete_and_accepted() {
    let mut spec = web1();
    spec.disks[1].location = ImageLocation::Path { path: "/srv/web1-data.raw".into() };
    let wire = VmSpec::from_peer(&spec.to_peer().unwrap()).unwrap();
    assert_eq!(
        wire.disks[1].location,
        ImageLocation::Pool { pool: "default".into(), file: "web1-data.raw".into() }
    );
    assert_eq!(wire.disks[1].unit, Some(0));
    assert_eq!(wire.disks[0].slot, Some(PciAddress::root(4, 0)));
    assert_eq!(wire.devices[0].slot, Some(PciAddress::root(1, 0)));
    assert_eq!(wire.addressed().unwrap(), wire, "choosing again changes nothing");
    let path = serde_json::to_vec(&spec).unwrap();
    assert!(VmSpec::from_peer(&path).unwrap_err()[0].contains("a peer may not"));
    spec.disks[1].location = ImageLocation::Path { path: "/srv/web1.qcow2".into() };
    assert!(spec.to_wire().unwrap_err()[0].contains("same file"));
    // A comma in a file's name is fine at home only.
    assert!(web1().to_peer().unwrap_err()[0].contains("plain file name"));
}

#[test]
fn names_mean_what_the_operator_said_and_never_leave_the_pool() {
    let dir = tempfile::tempdir().unwrap();
    let pool = dir.path().join("pool");
    fs::create_dir(&pool).unwrap();
    fs::write(dir.path().join("secret"), "x").unwrap();
    let mut policy = HostPolicy::default();
    policy.pools.insert("default".into(), pool.clone());
    policy.networks.insert("lan".into(), NetworkBackend::User { restrict: true });
    let spec = web1();

    let said = resolve(&spec, &policy).unwrap_err().join("; ");
    assert!(said.contains("disk data: it is given by a path"), "{said}");
    let own = resolve_own(&spec, &policy).unwrap();
    assert_eq!(own.disks[0].path, fs::canonicalize(&pool).unwrap().join("web1.qcow2"));
    assert_eq!(own.disks[1].path, PathBuf::from("/srv/web1,data.raw"));
    assert_eq!((own.accel, own.spec.accel), (Accel::Tcg, Some(Accel::Tcg)));
    assert_eq!(own.spec.nics[0].backend, Some(NetworkKind::User));

    symlink(dir.path().join("secret"), pool.join("web1.qcow2")).unwrap();
    assert!(resolve_own(&spec, &policy).unwrap_err()[0].contains("symbolic link"));
    fs::remove_file(pool.join("web1.qcow2")).unwrap();
    fs::create_dir(pool.join("web1.qcow2")).unwrap();
    assert!(resolve_own(&spec, &policy).unwrap_err()[0].contains("no plain file"));
    fs::remove_dir(pool.join("web1.qcow2")).unwrap();

    policy.networks.insert("lan".into(), NetworkBackend::None);
    policy.vcpus_max = 1;
    policy.memory_mib_max = 512;
    let mut moved = own.spec.clone();
    moved.accel = Some(Accel::Kvm);
    let said = resolve_own(&moved, &policy).unwrap_err().join("; ");
    for part in ["vcpus_max", "memory_mib_max", "on a user-mode network", "ran under kvm"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    policy.pools.clear();
    policy.networks.clear();
    policy.accel = AccelPreference::Kvm;
    let said = resolve_own(&spec, &policy).unwrap_err().join("; ");
    for part in ["no pool called default", "no network called lan", "KVM does not work"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_full_bus_is_told() {
    let mut spec = web1();
    for i in 0..40 {
        let mut device = spec.devices[0].clone();
        device.id = format!("s{i}");
        spec.devices.push(device);
    }
    assert!(spec.addressed().unwrap_err()[0].contains("no PCI slot is left"));
}

/// Text with what could matter to a command line, a path or a log.
fn nasty() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9._-]{1,8}", "[-,=/.:\\\\ \"'{}\n\0a-c]{0,12}", ".{0,80}"]
}

proptest! {
    #[test]
    fn whatever_passes_is_harmless(
        name in nasty(), id in nasty(), file in nasty(), pool in nasty(), network in nasty(),
        model in nasty(), machine in nasty(), option in nasty(), value in nasty(),
        mac in nasty(), serial in nasty(), vcpus: u32, memory_mib: u64,
    ) {
        let mut spec = web1();
        spec.name = name;
        spec.machine = format!("pc-q35-{machine}");
        spec.vcpus = vcpus;
        spec.memory_mib = memory_mib;
        spec.cpu.model = model;
        spec.cpu.features.insert(option.clone(), OptionValue::Word(value.clone()));
        spec.disks[0].id = id;
        spec.disks[0].location = ImageLocation::Pool { pool, file };
        spec.disks[0].serial = Some(serial);
        spec.disks[0].options.insert(option, OptionValue::Word(value));
        spec.nics[0].network = network;
        spec.nics[0].mac = mac;
        let first = spec.validate();
        prop_assert!(first.is_err() || spec.disks[0].options.len() == 2);
        if let Err(problems) = first {
            prop_assert!(!problems.is_empty());
            for problem in problems {
                prop_assert!(!problem.contains(|c: char| c.is_control()), "{:?}", problem);
            }
        }
    }

    #[test]
    fn no_bytes_from_a_peer_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let said = VmSpec::from_peer(&bytes).unwrap_err();
        prop_assert!(!said[0].contains(|c: char| c.is_control()));
    }

    #[test]
    fn damaged_descriptions_are_read_or_refused(at in 0usize..2000, byte: u8) {
        let mut bytes = serde_json::to_vec(&web1().addressed().unwrap()).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(spec) = VmSpec::from_peer(&bytes) {
            prop_assert!(spec.locations().iter().all(|(_, l)| l.as_path().is_none()));
        }
    }

    #[test]
    fn addresses_survive_text(slot in 0u8..32, function in 0u8..8, bridge in "[a-z][a-z0-9]{0,5}") {
        for bridge in [None, Some(bridge)] {
            let address = PciAddress { bridge, slot, function };
            prop_assert_eq!(address.to_string().parse::<PciAddress>(), Ok(address));
        }
    }
}
