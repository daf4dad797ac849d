//! VMs as real QEMUs have them: started, found again, adopted, checked, ended.
//!
//! Set `LONGHAUL_QEMU_72` and `LONGHAUL_QEMU_100` to the two `qemu-system-x86_64` (see
//! `bench/setup/qemu`); what has none to run with says so and is skipped.
#![allow(clippy::unwrap_used, reason = "a test ends where its premise does")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul::hypervisor::qemu::adopt::adopt;
use longhaul::hypervisor::qemu::args::Role;
use longhaul::hypervisor::qemu::check::{can_host, leaving};
use longhaul::hypervisor::qemu::launch::{QemuHandle, launch, running_vms};
use longhaul::hypervisor::qemu::probe::{KvmProbe, QemuFacts, boots};
use longhaul::hypervisor::qemu::qmp::{Qmp, QmpEvent};
use longhaul::hypervisor::spec::host::{
    AccelPreference, HostPolicy, NetworkBackend, resolve, resolve_own,
};
use longhaul::hypervisor::spec::{
    Accel, CacheMode, DiskBus, FirmwareSpec, ImageLocation, OptionValue, Topology,
};
use longhaul::hypervisor::{HypervisorError, RunState, VmSpec};
use serde_json::json;

/// A QEMU to test with.
struct Qemu {
    program: PathBuf,
    version: (u32, u32),
}

/// Every QEMU that the environment names.
fn qemus() -> Vec<Qemu> {
    let named = [("LONGHAUL_QEMU_72", (7, 2)), ("LONGHAUL_QEMU_100", (10, 0))];
    named
        .into_iter()
        .filter_map(|(variable, version)| match std::env::var_os(variable) {
            Some(program) => Some(Qemu { program: program.into(), version }),
            None => {
                eprintln!("SKIPPED with QEMU {}.{}: {variable} is not set", version.0, version.1);
                None
            }
        })
        .collect()
}

/// A host of its own: a folder with a pool and a run folder.
struct Host {
    dir: tempfile::TempDir,
    policy: HostPolicy,
}

fn host(qemu: &Path) -> Host {
    let dir = tempfile::Builder::new().prefix("lh").tempdir().unwrap();
    let pool = dir.path().join("pool");
    fs::create_dir(&pool).unwrap();
    let policy = HostPolicy {
        qemu: qemu.to_owned(),
        run_dir: dir.path().join("run"),
        pools: BTreeMap::from([("default".to_owned(), pool)]),
        networks: BTreeMap::from([
            ("lan".to_owned(), NetworkBackend::User { restrict: true }),
            ("none".to_owned(), NetworkBackend::None),
        ]),
        accel: AccelPreference::Tcg,
        ..HostPolicy::default()
    };
    Host { dir, policy }
}

impl Host {
    fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.policy.pools["default"].join(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    async fn start(&self, spec: &VmSpec, role: Role) -> Result<QemuHandle, HypervisorError> {
        let resolved = resolve_own(spec, &self.policy).expect("the host allows it");
        launch(&resolved, role, &self.policy.run_dir).await
    }
}

#[tokio::test]
async fn firmware_in_flash_is_described_started_and_carried() {
    for qemu in qemus() {
        let host = host(&qemu.program);
        // Any image of the right size will do for chips that are only there.
        let code = host.dir.path().join("code.fd");
        fs::File::create(&code).unwrap().set_len(256 << 10).unwrap();
        let vars = host.image("vars.fd", 128 << 10);
        fs::write(&vars, vec![0x5a; 128 << 10]).unwrap();
        let mut policy = host.policy.clone();
        policy.firmware.insert("plain".into(), code.clone());
        let line = format!(
            "-M pc-q35-7.2 -accel tcg -m 128 -nodefaults -machine pflash0=c,pflash1=v \
             -blockdev driver=file,filename={},node-name=c,read-only=on \
             -drive if=none,id=v,format=raw,file={}",
            code.display(),
            vars.display()
        );
        let mut by_hand = ByHand::start(&qemu.program, &line);
        let qmp = by_hand.connect("vm").await;
        let adopted = adopt(&qmp, &policy).await.unwrap();
        assert_eq!(adopted.not_understood, Vec::<String>::new());
        let in_pool = ImageLocation::Pool { pool: "default".into(), file: "vars.fd".into() };
        let wanted =
            FirmwareSpec::Uefi { code: "plain".into(), vars: in_pool, vars_bytes: 128 << 10 };
        assert_eq!(adopted.spec.firmware, wanted);
        drop(by_hand);

        fs::remove_file(&vars).unwrap();
        let resolved = resolve(&adopted.spec, &policy).unwrap();
        let vm = launch(&resolved, Role::Incoming, &policy.run_dir).await.unwrap();
        assert_eq!(fs::metadata(&vars).unwrap().len(), 128 << 10);
        vm.quit().await.unwrap();
    }
}

fn full(machine: &str) -> VmSpec {
    let text = include_str!("fixtures/full.toml").replace("MACHINE", machine);
    let mut spec: VmSpec = toml::from_str(&text).unwrap();
    if machine.contains("i440fx") {
        spec.devices.retain(|d| d.id != "port1" && d.id != "port2");
        spec.devices.iter_mut().for_each(|d| d.slot = None);
        for disk in spec.disks.iter_mut().filter(|d| d.id == "archive") {
            disk.bus = DiskBus::Ide;
        }
    }
    spec
}

const MACHINES: [&str; 2] = ["pc-q35-7.2", "pc-i440fx-7.2"];

#[tokio::test]
async fn a_vm_with_everything_starts_is_found_again_and_ends_without_leftovers() {
    for qemu in qemus() {
        for machine in MACHINES {
            let host = host(&qemu.program);
            for name in ["a.raw", "b.raw", "c.raw"] {
                host.image(name, 8 << 20);
            }
            let spec = full(machine);
            let vm = host.start(&spec, Role::Fresh).await.unwrap();
            assert_eq!((vm.qmp.version().0, vm.qmp.version().1), qemu.version);
            assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
            assert_eq!(vm.qmp.peer_pid(), Some(vm.process.pid));

            let again = host.start(&spec, Role::Fresh).await.unwrap_err();
            assert!(again.to_string().contains("runs on this host already"), "{again}");

            // A monitor serves one client: the old agent is gone when the new one comes.
            let (process, dir) = (vm.process, vm.paths.dir.clone());
            drop(vm);
            let found = running_vms(&host.policy.run_dir);
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].process, process);
            let vm = found[0].clone().attach().await.unwrap();
            assert_eq!(vm.spec.nics[0].mac, spec.nics[0].mac);
            vm.quit().await.unwrap();
            assert!(!vm.is_alive() && !dir.exists());
            assert_eq!(running_vms(&host.policy.run_dir), []);
        }
    }
}

#[tokio::test]
async fn an_incoming_vm_waits_and_can_be_killed() {
    for qemu in qemus() {
        let host = host(&qemu.program);
        for name in ["a.raw", "b.raw", "c.raw"] {
            host.image(name, 8 << 20);
        }
        let vm = host.start(&full(MACHINES[0]), Role::Incoming).await.unwrap();
        assert_eq!(vm.run_state().await.unwrap(), RunState::Incoming);
        let schema = vm.qmp.execute("query-qmp-schema", json!({})).await.unwrap();
        assert!(schema.as_array().unwrap().len() > 500);
        vm.kill().await.unwrap();
        assert!(!vm.is_alive() && !vm.paths.dir.exists());
        let gone = vm.qmp.execute("query-status", json!({})).await;
        assert!(matches!(gone, Err(HypervisorError::Gone { .. })), "{gone:?}");
    }
}

#[tokio::test]
async fn what_qemu_refuses_is_told_in_its_words_and_leaves_nothing() {
    for qemu in qemus() {
        let host = host(&qemu.program);
        let spec = full(MACHINES[0]);
        let said = host.start(&spec, Role::Fresh).await.unwrap_err().to_string();
        assert!(said.contains("a.raw") && said.contains("No such file"), "{said}");
        for name in ["a.raw", "b.raw", "c.raw"] {
            host.image(name, 8 << 20);
        }
        let mut spec = full("pc-q35-99.9");
        let said = host.start(&spec, Role::Fresh).await.unwrap_err().to_string();
        assert!(said.contains("machine"), "{said}");
        spec.machine = MACHINES[0].into();
        spec.cpu.model = "Imaginary".into();
        let said = host.start(&spec, Role::Fresh).await.unwrap_err().to_string();
        assert!(said.contains("unable to find CPU model 'Imaginary'"), "{said}");
        assert_eq!(fs::read_dir(&host.policy.run_dir).unwrap().count(), 0);
        drop(host.dir);
    }
}

/// A QEMU started by hand: ended when dropped.
struct ByHand {
    child: std::process::Child,
    dir: tempfile::TempDir,
}

impl ByHand {
    fn start(program: &Path, line: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("lh").tempdir().unwrap();
        let at = dir.path().to_str().unwrap();
        for name in ["a.raw", "b.raw", "c.raw"] {
            fs::File::create(dir.path().join(name)).unwrap().set_len(8 << 20).unwrap();
        }
        fs::write(dir.path().join("a.raw"), include_bytes!("fixtures/counter.bin")).unwrap();
        let file = fs::OpenOptions::new().write(true).open(dir.path().join("a.raw")).unwrap();
        file.set_len(8 << 20).unwrap();
        let line = line.replace("DIR", at);
        let child = std::process::Command::new(program)
            .args(line.split_whitespace())
            .args(["-display", "none", "-qmp", &format!("unix:{at}/qmp,server=on,wait=off")])
            .stdin(std::process::Stdio::null())
            .current_dir(dir.path())
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    async fn connect(&mut self, name: &str) -> Qmp {
        let path = self.dir.path().join("qmp");
        loop {
            match Qmp::connect(&path, name).await {
                Ok(qmp) => return qmp,
                Err(e) => match self.child.try_wait().unwrap() {
                    Some(status) => panic!("QEMU ended with {status}: {e}"),
                    None => tokio::time::sleep(Duration::from_millis(20)).await,
                },
            }
        }
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Machines as people start them, and what of each is not understood.
const BY_HAND: [(&str, &[&str]); 6] = [
    (
        "-machine q35,accel=tcg -cpu qemu64,+x2apic,-svm -smp 2,cores=2 -m 128 -nodefaults \
         -no-user-config -uuid 6e1f3c1e-5f3c-4d2a-9a1b-0c2d4e6f8a0b -rtc base=localtime \
         -drive file=DIR/a.raw,format=raw,if=none,id=d0,cache=none,discard=unmap \
         -device virtio-blk-pci,drive=d0,id=vda,bootindex=1,addr=0x9,serial=X1 \
         -blockdev driver=file,filename=DIR/b.raw,node-name=f1 \
         -blockdev {\"driver\":\"raw\",\"file\":\"f1\",\"node-name\":\"n1\",\"discard\":\"unmap\"} \
         -device pcie-root-port,id=rp1,chassis=1,port=0x10 \
         -device virtio-scsi-pci,id=scsi0,bus=rp1 \
         -device {\"driver\":\"scsi-hd\",\"drive\":\"n1\",\"bus\":\"scsi0.0\",\"scsi-id\":3} \
         -drive file=c.raw,format=raw,if=ide \
         -netdev user,id=n0 -device virtio-net-pci,netdev=n0,mac=52:54:00:01:02:03 \
         -device virtio-rng-pci -device virtio-balloon-pci,id=balloon -device qemu-xhci,id=xhci \
         -device usb-tablet,bus=xhci.0 -device usb-kbd,bus=xhci.0,port=3 \
         -device virtio-serial-pci -chardev null,id=c0 -device isa-serial,chardev=c0 \
         -chardev null,id=c1 -device virtserialport,chardev=c1,name=org.qemu.guest_agent.0 \
         -device i6300esb -device pvpanic -vga std",
        &[],
    ),
    (
        "-machine pc,accel=tcg,usb=on -m 128 -nodefaults -drive file=a.raw,format=raw,if=virtio \
         -drive file=b.raw,format=raw,if=ide,index=1 -nic user,model=e1000 -serial null \
         -device pci-bridge,id=br,chassis_nr=2 -device virtio-rng-pci,bus=br,addr=4 \
         -object memory-backend-ram,id=mem0,size=128M -machine memory-backend=mem0 -no-reboot",
        &[],
    ),
    (
        "-M q35 -accel tcg -m 128 -drive file=a.raw,format=raw -device virtio-balloon-pci",
        &["isa-parallel"],
    ),
    ("-M pc -accel tcg -m 128 -hda a.raw", &["isa-parallel", "floppy"]),
    (
        "-M q35 -accel tcg -m 128 -nodefaults -device virtio-9p-pci,fsdev=f,mount_tag=t \
         -fsdev local,id=f,path=DIR,security_model=none -smbios type=1,serial=7 \
         -device virtio-rng-pci,id=r,x-disable-pcie=on -global kvm-pit.lost_tick_policy=delay",
        &["virtio-9p-pci", "-fsdev", "-smbios", "x-disable-pcie=on", "-global"],
    ),
    (
        "-M q35 -accel tcg -m 128 -nodefaults -drive file=a.raw,format=raw,if=none,id=d \
         -device nvme,drive=d,serial=1",
        &["type nvme"],
    ),
];

#[tokio::test]
async fn a_vm_started_by_hand_is_described_whole_or_says_what_is_missing() {
    for qemu in qemus() {
        let policy = HostPolicy::default();
        for (line, missing) in BY_HAND {
            let mut by_hand = ByHand::start(&qemu.program, line);
            let qmp = by_hand.connect("vm").await;
            let adopted = adopt(&qmp, &policy).await.unwrap();
            assert_eq!(adopted.process.pid, by_hand.child.id() as i32);
            for what in missing {
                let said = &adopted.not_understood;
                assert!(said.iter().any(|s| s.contains(what)), "{line}\n{what}: {said:#?}");
            }
            let expected = |said: &&String| missing.iter().any(|what| said.contains(what));
            let surprise = adopted.not_understood.iter().find(|said| !expected(said));
            assert_eq!(surprise, None, "{line}");
            adopted.spec.validate().unwrap();
            if line == BY_HAND[0].0 {
                first_in_detail(&adopted.spec, by_hand.dir.path());
            }
        }
    }
}

fn first_in_detail(spec: &VmSpec, dir: &Path) {
    let path = |name: &str| ImageLocation::Path { path: dir.join(name) };
    assert!(spec.machine.starts_with("pc-q35-"), "{}", spec.machine);
    assert_eq!((spec.vcpus, spec.memory_mib), (2, 128));
    assert_eq!(spec.topology, Some(Topology { sockets: 1, cores: 2, threads: 1 }));
    assert_eq!(spec.cpu.model, "qemu64");
    assert_eq!(spec.cpu.features["svm"], OptionValue::Switch(false));
    assert_eq!(spec.cpu.features["x2apic"], OptionValue::Switch(true));
    let disk = |id: &str| spec.disks.iter().find(|d| d.id == id).unwrap();
    let vda = disk("vda");
    assert_eq!(vda.location, path("a.raw"));
    assert_eq!(vda.slot, Some("09.0".parse().unwrap()));
    assert_eq!((vda.cache, vda.discard), (CacheMode::None, true));
    assert_eq!(vda.serial.as_deref(), Some("X1"));
    assert_eq!(vda.options["bootindex"], OptionValue::Number(1));
    let scsi = spec.disks.iter().find(|d| d.bus == DiskBus::Scsi).unwrap();
    assert_eq!(scsi.location, path("b.raw"));
    assert_eq!((scsi.unit, scsi.controller.as_deref()), (Some(3), Some("scsi0")));
    assert!(scsi.discard);
    let sata = spec.disks.iter().find(|d| d.bus == DiskBus::Sata).unwrap();
    assert_eq!((&sata.location, sata.unit), (&path("c.raw"), Some(0)));
    assert_eq!(spec.nics[0].mac, "52:54:00:01:02:03");
    let scsi0 = spec.devices.iter().find(|d| d.id == "scsi0").unwrap();
    assert_eq!(scsi0.slot.as_ref().unwrap().to_string(), "rp1:00.0");
}

/// The machine type that both QEMUs have.
fn pinned(line: &str) -> String {
    line.replace("-M q35", "-M pc-q35-7.2")
        .replace("-M pc ", "-M pc-i440fx-7.2 ")
        .replace("-machine q35", "-machine pc-q35-7.2")
        .replace("-machine pc,", "-machine pc-i440fx-7.2,")
}

#[tokio::test]
async fn a_target_made_from_the_description_takes_the_state_over() {
    let qemus = qemus();
    for from in &qemus {
        for to in qemus.iter().filter(|to| to.version >= from.version) {
            for (line, missing) in BY_HAND {
                if missing.is_empty() {
                    take_over(from, to, &pinned(line)).await;
                }
            }
        }
    }
}

async fn take_over(from: &Qemu, to: &Qemu, line: &str) {
    let mut by_hand = ByHand::start(&from.program, line);
    let source = by_hand.connect("vm").await;
    let host = host(&to.program);
    let mut policy = host.policy.clone();
    policy.networks.insert("user".into(), NetworkBackend::User { restrict: false });
    let adopted = adopt(&source, &policy).await.unwrap();
    assert_eq!(leaving(&source).await.unwrap(), Vec::<String>::new());
    let spec = VmSpec::from_peer(&adopted.spec.to_peer().unwrap()).unwrap();
    for disk in &spec.disks {
        let ImageLocation::Pool { file, .. } = &disk.location else { panic!("{disk:?}") };
        host.image(file, 8 << 20);
    }
    let facts = QemuFacts::ask(&policy.qemu, &policy.run_dir).await.unwrap();
    let sizes = vec![8 << 20; spec.disks.len()];
    assert_eq!(can_host(&spec, &policy, &facts, &sizes), Vec::<String>::new());
    let resolved = resolve(&spec, &policy).unwrap();
    let target = launch(&resolved, Role::Incoming, &policy.run_dir).await.unwrap();
    assert!(can_host(&spec, &policy, &facts, &sizes)[0].contains("runs here already"));

    let uri = format!("unix:{}", target.paths.migration.display());
    let events = |qmp: &Qmp| {
        let on = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        let (qmp, events) = (qmp.clone(), qmp.events());
        async move {
            qmp.execute("migrate-set-capabilities", on).await.unwrap();
            events
        }
    };
    let (mut left, mut arrived) = (events(&source).await, events(&target.qmp).await);
    target.qmp.execute("migrate-incoming", json!({ "uri": uri })).await.unwrap();
    source.execute("migrate", json!({ "uri": uri })).await.unwrap();
    let ended = |e: &QmpEvent| {
        e.name == "MIGRATION"
            && ["completed", "failed"].contains(&e.data["status"].as_str().unwrap())
    };
    let limit = Duration::from_secs(60);
    let sent = source.wait_event(&mut left, ended, limit).await.unwrap();
    let words = || format!("{line}\n{}", target.last_words());
    let loaded = target.qmp.wait_event(&mut arrived, ended, limit).await;
    assert_eq!(sent.data["status"], "completed", "{}", words());
    let loaded = loaded.unwrap_or_else(|e| panic!("{e}: {}", words()));
    assert_eq!(loaded.data["status"], "completed", "{}", words());
    // QEMU tells that a migration has ended before it takes the VM out of this state.
    let leaves = async || {
        while source.execute("query-status", json!({})).await.unwrap()["status"] == "finish-migrate"
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(limit, leaves()).await.unwrap();
    let said = leaving(&source).await.unwrap();
    assert!(said.iter().any(|s| s.contains("migrated already")), "{said:?}");
    target.qmp.execute("cont", json!({})).await.unwrap();
    assert_eq!(target.run_state().await.unwrap(), RunState::Running);
    target.quit().await.unwrap();
    assert_eq!(fs::read_dir(&policy.run_dir).unwrap().count(), 0);
}

#[tokio::test]
async fn a_device_that_cannot_move_is_told_before_anything_is_sent() {
    for qemu in qemus() {
        let mut by_hand = ByHand::start(&qemu.program, BY_HAND[5].0);
        let qmp = by_hand.connect("vm").await;
        let said = leaving(&qmp).await.unwrap();
        assert!(said.len() == 1 && said[0].contains("nvme"), "{said:?}");
    }
}

#[tokio::test]
async fn a_probe_ends_with_an_answer() {
    for qemu in qemus() {
        let host = host(&qemu.program);
        let run_dir = &host.policy.run_dir;
        let tcg = boots(&qemu.program, Accel::Tcg, run_dir).await;
        assert!(tcg.works, "{}", tcg.why);
        let probe = KvmProbe::default();
        let kvm = probe.answer(&qemu.program, run_dir).await;
        eprintln!("KVM with QEMU {:?} works: {}: {}", qemu.version, kvm.works, kvm.why);
        assert!(!kvm.why.is_empty());
        let none = boots(Path::new("/nonexistent/qemu"), Accel::Tcg, run_dir).await;
        assert!(!none.works && none.why.contains("could not be started"), "{}", none.why);
        assert_eq!(fs::read_dir(run_dir).unwrap().count(), 0);
    }
}
