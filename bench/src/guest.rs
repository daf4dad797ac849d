//! The guests: how each is built, and which machine it wants.
//!
//! Invariant: a built image is only ever copied; what boots is the copy.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Which guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Boots in seconds: a kernel, busybox and the self-checking load.
    Tiny,
    /// Debian with PostgreSQL, Redis and nginx under load.
    Debian,
}

/// How an image is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The guest's bytes.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl Format {
    /// As QEMU calls it; also the file name's extension.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// The machine that a guest runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Which guest.
    pub guest: Kind,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// How its disk is encoded, at both ends.
    pub format: Format,
    /// The kernel's command line.
    pub append: String,
    /// QEMU's accelerator.
    pub accel: String,
}

/// What `bench/guest/*/build` printed a folder of.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its machine.
    pub machine: Machine,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system.
    pub initrd: PathBuf,
    /// The disk as built: to be copied, never booted.
    pub disk: PathBuf,
}

/// The folder with the guests' and the tools' scripts.
pub fn bench_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a script of the lab that prints a folder.
///
/// # Errors
///
/// When it fails; its own words are on stderr.
pub fn folder_of(script: &str, arguments: &[&str]) -> Result<PathBuf> {
    let path = bench_folder().join(script);
    let output = Command::new(&path)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("while running {}", path.display()))?;
    ensure!(output.status.success(), "{} failed ({})", path.display(), output.status);
    let text = String::from_utf8(output.stdout).context("while reading a folder's name")?;
    let folder = PathBuf::from(text.lines().last().unwrap_or_default().trim());
    ensure!(folder.is_dir(), "{} printed {text:?}, which is no folder", path.display());
    Ok(folder)
}

impl Guest {
    /// Builds a guest (or finds it built) with the machine that it wants by default.
    ///
    /// # Errors
    ///
    /// When its build script fails.
    pub fn build(kind: Kind) -> Result<Self> {
        let (script, memory_mib, cpus, append) = match kind {
            Kind::Tiny => ("guest/tiny/build", 256, 1, ""),
            Kind::Debian => ("guest/debian/build", 1024, 2, "root=/dev/vda rw "),
        };
        let folder = folder_of(script, &[])?;
        let append = format!("{append}console=ttyS0 quiet loglevel=1 panic=-1");
        let machine = Machine {
            guest: kind,
            memory_mib,
            cpus,
            format: Format::Raw,
            append,
            accel: "tcg".to_owned(),
        };
        Ok(Self {
            machine,
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd"),
            disk: folder.join("disk.raw"),
        })
    }

    /// Makes a fresh copy of the disk in `folder` and gives its path.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    pub fn copy_disk(&self, folder: &Path) -> Result<PathBuf> {
        let format = self.machine.format.name();
        let copy = folder.join(format!("disk.{format}"));
        let script = bench_folder().join("guest/disk");
        let status = Command::new(&script)
            .arg("copy")
            .arg(&self.disk)
            .arg(format)
            .arg(&copy)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("while running {}", script.display()))?;
        ensure!(status.success(), "the copy of {} failed ({status})", self.disk.display());
        Ok(copy)
    }
}
