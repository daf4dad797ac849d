//! The command line as a whole, so that every change to it is seen.

use std::path::PathBuf;

use super::*;
use crate::hypervisor::spec::VmSpec;
use crate::hypervisor::spec::host::ResolvedDisk;

fn web1() -> ResolvedVm {
    let spec: VmSpec = toml::from_str(include_str!("web1.toml")).unwrap();
    ResolvedVm {
        spec: spec.addressed().unwrap(),
        qemu: PathBuf::from("/usr/bin/qemu-system-x86_64"),
        accel: Accel::Kvm,
        disks: vec![
            ResolvedDisk { path: "/pool/a,b\"c.qcow2".into(), is_device: false },
            ResolvedDisk { path: "/dev/vg/web1".into(), is_device: true },
        ],
        nics: vec![
            NetworkBackend::Bridge { bridge: "br0".into(), helper: None },
            NetworkBackend::None,
        ],
        flash: Some(("/fw/code.fd".into(), "/pool/web1-vars.fd".into())),
        kernel: None,
        sandbox: true,
    }
}

#[test]
fn the_command_line_is_exactly_this() {
    let paths = RunPaths::new(&PathBuf::from("/run/a,b"), "web1").unwrap();
    let line: Vec<String> = arguments(&web1(), Role::Incoming, &paths)
        .into_iter()
        .map(|a| a.into_string().unwrap())
        .collect();
    let golden = include_str!("web1.args");
    assert_eq!(line.join("\n") + "\n", golden, "if this is meant, change web1.args");
}

#[test]
fn only_an_incoming_guest_waits() {
    let paths = RunPaths::new(&PathBuf::from("/run"), "web1").unwrap();
    let fresh = arguments(&web1(), Role::Fresh, &paths);
    let incoming = arguments(&web1(), Role::Incoming, &paths);
    let rest: Vec<_> = incoming
        .iter()
        .filter(|a| !["-S", "-incoming", "defer"].contains(&a.to_str().unwrap()))
        .collect();
    assert_eq!(rest, fresh.iter().collect::<Vec<_>>());
    assert_eq!(incoming.len(), fresh.len() + 3);
}

#[test]
fn networks_become_backends() {
    let script = PathBuf::from("/etc/up,1");
    let tap = NetworkBackend::Tap { script, down_script: None, vhost: true };
    assert_eq!(netdev(&tap, "x"), "tap,id=x,script=/etc/up,,1,downscript=no,vhost=on");
    let bridge = NetworkBackend::Bridge { bridge: "br,0".into(), helper: Some("/h".into()) };
    assert_eq!(netdev(&bridge, "x"), "bridge,id=x,br=br,,0,helper=/h");
    assert_eq!(netdev(&NetworkBackend::User { restrict: true }, "x"), "user,id=x,restrict=on");
}
