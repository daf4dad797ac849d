//! Real QEMUs for the memory tests: a boot sector as the guest, a monitor, guest RAM as a file.
//!
//! Invariant: a [`Guest`] that is dropped leaves nothing behind: its process is killed by its own id
//! and everything it made lies in one temporary folder.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use longhaul::hypervisor::HypervisorError;
use longhaul::hypervisor::qemu::memory::{SourceMemory, TargetMemory};
use longhaul::hypervisor::qemu::qmp::Qmp;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// The machine that every QEMU of the tests can be.
const MACHINE: &str = "pc-q35-7.2,accel=tcg";
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;

/// Where the guest counts, and how wide.
const COUNTER: u64 = 0x7E00;

/// How long anything that is waited for may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest.
///
/// QEMU before 9.0 under TCG does not see a write to a page whose dirty mark it has taken until the
/// guest empties its TLB ("physmem: Fix migration dirty bitmap coherency with TCG memory access").
/// Operating systems do that all the time; this guest does it by turning CR0.WP over.
///
/// ```text
///       cli; xor ax,ax; mov ds,ax; mov ss,ax; mov sp,0x7c00; cld; sti
/// tick: inc dword [0x7e00]                  ; once per timer interrupt, 18 times a second,
///       mov eax,[0x7e00]; mov bx,0x2000
/// page: mov es,bx; xor di,di; mov cx,1024   ; fill 64 pages from 0x20000 on,
///       rep stosd                           ; each with a word of its own that changes every time
///       inc eax; add bx,0x100; cmp bx,0x6000; jne page
///       mov eax,cr0; xor eax,0x10000; mov cr0,eax
///       hlt; jmp tick
/// ```
const BOOT_CODE: [u8; 61] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xD0, 0xBC, 0x00, 0x7C, 0xFC, 0xFB, 0x66, 0xFF, 0x06, 0x00,
    0x7E, 0x66, 0xA1, 0x00, 0x7E, 0xBB, 0x00, 0x20, 0x8E, 0xC3, 0x31, 0xFF, 0xB9, 0x00, 0x04, 0x66,
    0xF3, 0xAB, 0x66, 0x40, 0x81, 0xC3, 0x00, 0x01, 0x81, 0xFB, 0x00, 0x60, 0x75, 0xEA, 0x0F, 0x20,
    0xC0, 0x66, 0x35, 0x00, 0x00, 0x01, 0x00, 0x0F, 0x22, 0xC0, 0xF4, 0xEB, 0xCF,
];

/// A QEMU of some version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Qemu {
    pub(crate) version: &'static str,
    binary: PathBuf,
}

impl Qemu {
    /// Whether what it sends is to the byte what its guest had. Before 9.0 it is not under TCG: of a
    /// page that is written just when its dirty mark is taken, the rest may be missed.
    pub(crate) fn sends_all_writes(&self) -> bool {
        self.version != "7.2"
    }
}

/// The QEMUs that the environment names, as a binary or as the folder that `bench/setup/qemu` prints.
/// Says loudly what is skipped without them.
pub(crate) fn qemus() -> Vec<Qemu> {
    let named = [("7.2", "LONGHAUL_QEMU_72"), ("10.0", "LONGHAUL_QEMU_100")];
    let found = named.into_iter().filter_map(|(version, variable)| {
        let Some(value) = std::env::var_os(variable) else {
            // Not `eprintln!`, which nobody sees of a test that passes.
            let message =
                format!("SKIPPED: QEMU {version}: set {variable}=$(bench/setup/qemu {version})\n");
            std::io::stderr().write_all(message.as_bytes()).unwrap();
            return None;
        };
        let path = PathBuf::from(value);
        let binary = if path.is_dir() { path.join("bin/qemu-system-x86_64") } else { path };
        assert!(binary.is_file(), "{variable}: there is no {}", binary.display());
        Some(Qemu { version, binary })
    });
    found.collect()
}

pub(crate) struct Guest {
    pub(crate) qmp: Qmp,
    process: Child,
    dir: TempDir,
}

impl Guest {
    /// Boots the guest and waits until it counts.
    pub(crate) async fn boot(qemu: &Qemu) -> Self {
        let guest = Self::start(qemu, &[]).await;
        guest.counts_beyond(3).await;
        guest
    }

    /// Starts a QEMU that waits for a guest.
    pub(crate) async fn incoming(qemu: &Qemu) -> Self {
        Self::start(qemu, &["-incoming", "defer", "-S"]).await
    }

    async fn start(qemu: &Qemu, more: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("longhaul-memory-").tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        let mut sector = BOOT_CODE.to_vec();
        sector.resize(510, 0);
        sector.extend_from_slice(&[0x55, 0xAA]);
        sector.resize(1 << 20, 0);
        std::fs::write(&disk, sector).unwrap();

        let monitor = dir.path().join("qmp");
        let words = std::fs::File::create(dir.path().join("words")).unwrap();
        let mut drive = OsString::from("if=none,id=disk,format=raw,file=");
        drive.push(&disk);
        let mut listen = OsString::from("unix:");
        listen.push(&monitor);
        listen.push(",server=on,wait=off");
        let process = Command::new(&qemu.binary)
            .args(["-machine", MACHINE, "-cpu", "qemu64", "-m", "64", "-nodefaults"])
            .args(["-display", "none", "-device", "virtio-blk-pci,drive=disk", "-drive"])
            .arg(drive)
            .arg("-qmp")
            .arg(listen)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words)
            .kill_on_drop(true)
            .spawn()
            .unwrap();

        let deadline = Instant::now() + PATIENCE;
        let qmp = loop {
            match Qmp::connect(&monitor, "guest").await {
                Ok(qmp) => break qmp,
                Err(error) => assert!(Instant::now() < deadline, "no monitor: {error}"),
            }
            sleep(Duration::from_millis(20)).await;
        };
        Self { qmp, process, dir }
    }

    pub(crate) fn source(&self) -> SourceMemory {
        SourceMemory::new(self.qmp.clone(), self.path("memory-out"))
    }

    pub(crate) fn target(&self) -> TargetMemory {
        TargetMemory::new(self.qmp.clone(), self.path("memory-in"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).await.unwrap()
    }

    pub(crate) async fn state(&self) -> String {
        let status = self.execute("query-status", json!({})).await;
        status["status"].as_str().unwrap().to_owned()
    }

    /// A stretch of guest memory.
    pub(crate) async fn memory(&self, from: u64, bytes: u64) -> Vec<u8> {
        let file = self.path("saved");
        let arguments = json!({"val": from, "size": bytes, "filename": file});
        self.execute("pmemsave", arguments).await;
        let saved = std::fs::read(&file).unwrap();
        assert_eq!(saved.len() as u64, bytes);
        saved
    }

    pub(crate) async fn ram(&self) -> Vec<u8> {
        self.memory(0, MEMORY_BYTES).await
    }

    pub(crate) async fn counter(&self) -> u32 {
        u32::from_le_bytes(self.memory(COUNTER, 4).await.try_into().unwrap())
    }

    /// Waits until the guest has counted beyond `floor`: that is how it proves that it lives.
    pub(crate) async fn counts_beyond(&self, floor: u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the firmware is done the word is anything.
            let counter = self.counter().await;
            if counter > floor && counter < floor + 100_000 {
                return;
            }
            assert!(Instant::now() < deadline, "the guest stands at {counter}: {}", self.words());
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// What QEMU printed.
    pub(crate) fn words(&self) -> String {
        std::fs::read_to_string(self.path("words")).unwrap_or_default()
    }

    /// Ends the process; for guests whose QEMU must be gone before the next step.
    pub(crate) async fn kill(mut self) {
        self.process.kill().await.unwrap();
    }
}

/// The first page in which two memories differ.
pub(crate) fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    assert_eq!(a.len(), b.len());
    let page = a.chunks(4096).zip(b.chunks(4096)).position(|(a, b)| a != b);
    page.map(|page| page as u64 * 4096)
}

/// An error's text, all of it.
pub(crate) fn told(error: &HypervisorError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// Whether a socket file is left.
pub(crate) fn is_left(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
