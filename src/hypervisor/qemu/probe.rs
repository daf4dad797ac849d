//! What a host's QEMU can do, by trying it.
//!
//! Invariant: KVM works if a guest has booted with it, and for no other reason: `/dev/kvm` also
//! opens where the processor underneath cannot run a guest. Everything started here has ended when
//! the answer is there.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

use super::qmp::Qmp;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::spec::Accel;

/// The boot sector; its source lies beside it.
const BOOT_SECTOR: &[u8; 512] = include_bytes!("probe/boot.bin");
/// Size of the disk it is on: the BIOS boots from nothing much smaller.
const BOOT_DISK_BYTES: u64 = 1 << 20;
/// How QEMU exits when the boot sector writes 0x10: twice that, plus one.
const BOOTED: i32 = 0x10 * 2 + 1;
/// How long the boot may take: a good one takes well under a second.
const BOOT_LIMIT: Duration = Duration::from_secs(15);
/// How long QEMU may take to answer what it knows.
const FACTS_LIMIT: Duration = Duration::from_secs(30);
/// How often a probe is looked at.
const POLL: Duration = Duration::from_millis(20);
/// What QEMU says when KVM gives up on a guest, which it then keeps for debugging.
const KVM_GAVE_UP: &str = "KVM internal error";
/// How much of QEMU's messages an answer quotes.
const WORDS_CHARS_MAX: usize = 300;

/// Whether an accelerator runs guests here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccelAnswer {
    /// Whether it does.
    pub works: bool,
    /// How that showed, in words.
    pub why: String,
}

/// Asks once, and remembers.
#[derive(Debug, Default)]
pub struct KvmProbe {
    answer: OnceCell<AccelAnswer>,
}

impl KvmProbe {
    /// Whether KVM runs guests with this QEMU. `run_dir` is for the probe's files; they do not stay.
    pub async fn answer(&self, qemu: &Path, run_dir: &Path) -> &AccelAnswer {
        self.answer
            .get_or_init(|| async {
                let answer = boots(qemu, Accel::Kvm, run_dir).await;
                tracing::info!(works = answer.works, why = answer.why, "KVM probed");
                answer
            })
            .await
    }
}

/// A folder that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(run_dir: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        // The leading dot: no VM's folder has one.
        let dir = run_dir.join(format!(".probe-{}-{nth}", std::process::id()));
        fs::create_dir_all(run_dir)?;
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), error = %e, "probe folder stays");
        }
    }
}

/// Boots a tiny guest and says whether it came up.
pub async fn boots(qemu: &Path, accel: Accel, run_dir: &Path) -> AccelAnswer {
    let no = |why: String| AccelAnswer { works: false, why };
    match try_boot(qemu, accel, run_dir).await {
        Err(e) => no(format!("a probe with {} could not be started: {e}", accel.name())),
        Ok((Some(status), _)) if status.code() == Some(BOOTED) => {
            AccelAnswer { works: true, why: "a guest booted".to_owned() }
        }
        Ok((Some(status), words)) => no(format!("a guest did not boot ({status}): {words}")),
        Ok((None, words)) if words.contains(KVM_GAVE_UP) => {
            no(format!("it gave up on a guest while that booted: {words}"))
        }
        Ok((None, words)) => {
            no(format!("a guest did not boot within {} s: {words}", BOOT_LIMIT.as_secs()))
        }
    }
}

async fn try_boot(
    qemu: &Path,
    accel: Accel,
    run_dir: &Path,
) -> io::Result<(Option<ExitStatus>, String)> {
    let scratch = Scratch::new(run_dir)?;
    let disk = scratch.0.join("boot.raw");
    fs::write(&disk, BOOT_SECTOR)?;
    fs::OpenOptions::new().write(true).open(&disk)?.set_len(BOOT_DISK_BYTES)?;
    let file = json!({
        "driver": "raw", "node-name": "boot", "read-only": true,
        "file": { "driver": "file", "filename": disk.to_string_lossy() },
    });
    // `host` so that no feature is asked for that this host lacks.
    let cpu = if accel == Accel::Kvm { "host" } else { "qemu64" };
    let log = fs::File::create(scratch.0.join("log"))?;
    let mut child = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-m", "64"])
        .args(["-machine", "pc", "-accel", accel.name(), "-cpu", cpu])
        .args(["-blockdev", &file.to_string()])
        .args(["-device", "virtio-blk-pci,drive=boot"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?;
    let words = || fs::read_to_string(scratch.0.join("log")).unwrap_or_default();
    let deadline = Instant::now() + BOOT_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= deadline || words().contains(KVM_GAVE_UP) {
            child.kill().await?;
            break None;
        }
        sleep(POLL).await;
    };
    Ok((status, shortened(&words())))
}

/// The beginning of a message, on one line.
fn shortened(words: &str) -> String {
    let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.is_empty() {
        "QEMU left no message".to_owned()
    } else {
        line.chars().take(WORDS_CHARS_MAX).collect()
    }
}

/// What a QEMU knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuFacts {
    /// Its version.
    pub version: (u32, u32, u32),
    /// Machine types.
    pub machines: Vec<MachineFact>,
    /// CPU models, by name.
    pub cpu_models: Vec<String>,
}

/// A machine type that a QEMU has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MachineFact {
    /// Its name.
    pub name: String,
    /// Its other name, such as `q35`.
    #[serde(default)]
    pub alias: Option<String>,
    /// Most CPUs.
    #[serde(rename = "cpu-max")]
    pub cpu_max: u32,
}

#[derive(Deserialize)]
struct CpuModel {
    name: String,
}

impl QemuFacts {
    /// Asks a QEMU that runs.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`], and `Unexpected` if the answer is not understood.
    pub async fn of(qmp: &Qmp) -> Result<Self, HypervisorError> {
        let misread = |e: serde_json::Error| HypervisorError::Unexpected {
            vm: qmp.vm().to_owned(),
            detail: format!("its lists of machines and CPU models: {e}"),
        };
        let machines = qmp.execute("query-machines", json!({})).await?;
        let models = qmp.execute("query-cpu-definitions", json!({})).await?;
        let models: Vec<CpuModel> = serde_json::from_value(models).map_err(misread)?;
        Ok(Self {
            version: qmp.version(),
            machines: serde_json::from_value(machines).map_err(misread)?,
            cpu_models: models.into_iter().map(|m| m.name).collect(),
        })
    }

    /// Starts this QEMU without a machine and asks it.
    ///
    /// # Errors
    ///
    /// `Io` or `Gone` if it does not start, else as [`of`](Self::of).
    pub async fn ask(qemu: &Path, run_dir: &Path) -> Result<Self, HypervisorError> {
        let doing = format!("asking {} what it can do", qemu.display());
        let failed = |source| HypervisorError::Io { doing: doing.clone(), source };
        let scratch = Scratch::new(run_dir).map_err(failed)?;
        let socket = scratch.0.join("qmp.sock");
        // No list of options: a comma in the path would be taken for one, and none is needed.
        let mut child = Command::new(qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S"])
            .args(["-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off"])
            .args(["-mon", "chardev=qmp,mode=control"])
            .current_dir(&scratch.0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let facts = Self::ask_child(&mut child, &socket).await;
        child.kill().await.map_err(failed)?;
        facts
    }

    async fn ask_child(child: &mut Child, socket: &Path) -> Result<Self, HypervisorError> {
        let deadline = Instant::now() + FACTS_LIMIT;
        loop {
            match Qmp::connect(socket, "a QEMU without a VM").await {
                Ok(qmp) => return Self::of(&qmp).await,
                Err(e) => {
                    let ended = !matches!(child.try_wait(), Ok(None));
                    if ended || Instant::now() >= deadline {
                        return Err(e);
                    }
                }
            }
            sleep(POLL).await;
        }
    }

    /// The machine type with this name or other name.
    pub fn machine(&self, name: &str) -> Option<&MachineFact> {
        self.machines.iter().find(|m| m.name == name || m.alias.as_deref() == Some(name))
    }

    /// The machine type of this QEMU's that is the newest of the same family, to suggest.
    pub fn newest_like(&self, name: &str) -> Option<&str> {
        let alias = if name.starts_with("pc-q35") { "q35" } else { "pc" };
        self.machine(alias).map(|m| m.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_sector_is_what_its_source_says() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("boot.s");
        fs::write(&source, include_str!("probe/boot.s")).unwrap();
        let run = |program: &str, args: &[&str]| {
            std::process::Command::new(program).args(args).current_dir(dir.path()).status()
        };
        let assembled = run("as", &["--64", "boot.s", "-o", "boot.o"]);
        let Ok(status) = assembled else {
            eprintln!("SKIPPED: there is no assembler here");
            return;
        };
        assert!(status.success());
        let link = ["-e", "0", "-Ttext=0", "--oformat", "binary", "-m", "elf_x86_64"];
        let files = ["boot.o", "-o", "boot.bin"];
        assert!(run("ld", &[&link[..], &files].concat()).unwrap().success());
        assert_eq!(fs::read(dir.path().join("boot.bin")).unwrap(), BOOT_SECTOR);
    }
}
