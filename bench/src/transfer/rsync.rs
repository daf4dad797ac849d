//! A flow by rsync: one file, whole, into an rsync daemon of the other side.
//!
//! Invariant: the daemon and the client end with the process that started them.
//!
//! rsync makes its connection itself, so its time starts with the program; and what has arrived is
//! the length of the file, looked at every few milliseconds.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::meter::{LOOK_PERIOD, Meter, Stop, Supply, payload_block};
use super::{Answer, Bound, Order, ends};
use crate::netns::Side;
use crate::profile::Profile;

/// The file's name at both ends.
const FILE: &str = "file";
/// The daemon's name for the folder into which it writes.
const MODULE: &str = "target";
/// The daemon's port; the namespace has no other.
const PORT: u16 = 873;
/// How long the daemon may take to answer.
const START_WAIT: Duration = Duration::from_secs(10);
/// Bytes that the file is written in.
const BLOCK_BYTES: usize = 4 << 20;

/// What this host's rsync says of itself.
///
/// # Errors
///
/// When there is none.
pub(super) fn version() -> Result<String> {
    let output = Command::new("rsync")
        .arg("--version")
        .output()
        .context("while running rsync: `bench/setup/packages` installs it")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn source(folder: &Path) -> PathBuf {
    folder.join("source").join(FILE)
}

fn target(folder: &Path) -> PathBuf {
    folder.join(MODULE).join(FILE)
}

/// Makes the file: as long as it has to be, or more than the link carries in the time.
pub(super) fn prepare(folder: &Path, bound: Bound, profile: &Profile) -> Result<()> {
    fs::create_dir(folder.join("source"))?;
    fs::create_dir(folder.join(MODULE))?;
    let mut left = match bound {
        Bound::Bytes(bytes) => bytes,
        Bound::Seconds(seconds) => {
            profile.carried_bytes(Duration::ZERO, Duration::from_secs_f64(seconds)) as u64
        }
    };
    let block = payload_block(BLOCK_BYTES);
    let path = source(folder);
    let mut file = fs::File::create(&path)?;
    while left > 0 {
        let bytes = left.min(block.len() as u64);
        file.write_all(&block[..bytes as usize])
            .with_context(|| format!("while writing {}", path.display()))?;
        left -= bytes;
    }
    // What is written back later would be in the way of what is measured.
    file.sync_all()?;
    Ok(())
}

/// A process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // Waited for, so that its CPU time counts as this process's children's.
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Result<Running> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    Ok(Running(child.context("while starting rsync")?))
}

/// Sends the file.
pub(super) fn send(order: &Order, supply: &Supply) -> Result<()> {
    let file = source(&order.folder);
    supply.begin();
    supply.offer_all(fs::metadata(&file)?.len());
    let url = format!("rsync://{}:{}/{MODULE}/{FILE}", Side::B.address(), order.port);
    // No comparing, no second copy, no compressing: a file that the other side does not have.
    let options = ["--whole-file", "--inplace", "--no-compress"];
    let mut client = start(Command::new("rsync").args(options).arg(&file).arg(url))?;
    // One stream, a file without end: there is nothing to bring to its end when the time is over.
    while !supply.is_late() && !supply.is_cut_short() {
        if let Some(status) = client.0.try_wait()? {
            ensure!(status.success(), "rsync ended with {status}");
            return Ok(());
        }
        std::thread::sleep(LOOK_PERIOD);
    }
    Ok(())
}

/// Runs the daemon until the lab has had enough.
pub(super) fn receive(order: &Order, meter: &Meter, stop: &Stop) -> Result<()> {
    let config = order.folder.join("rsyncd.conf");
    let path = order.folder.join(MODULE);
    let text = format!(
        "use chroot = no\nuid = 0\ngid = 0\n[{MODULE}]\npath = {}\nread only = no\n",
        path.display()
    );
    fs::write(&config, text)?;
    let mut daemon = start(
        Command::new("rsync")
            .args(["--daemon", "--no-detach", &format!("--port={PORT}")])
            .arg(format!("--log-file={}", order.folder.join("rsyncd.log").display()))
            .arg(format!("--config={}", config.display())),
    )?;
    let deadline = Instant::now() + START_WAIT;
    while TcpStream::connect((Side::B.address(), PORT)).is_err() {
        if let Some(status) = daemon.0.try_wait()? {
            bail!("the rsync daemon ended with {status}");
        }
        ensure!(Instant::now() < deadline, "the rsync daemon does not answer");
        std::thread::sleep(LOOK_PERIOD);
    }
    meter.begin();
    ends::say(&Answer::Ready { port: PORT })?;
    while !stop.is_set() {
        std::thread::sleep(LOOK_PERIOD / 2);
        meter.set_payload(length(&order.folder));
    }
    drop(daemon);
    meter.set_payload(length(&order.folder));
    Ok(())
}

fn length(folder: &Path) -> u64 {
    fs::metadata(target(folder)).map_or(0, |metadata| metadata.len())
}
