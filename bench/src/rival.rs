//! The first rival: QEMU alone, driven the way libvirt drives it for a move without shared storage.
//!
//! Invariant: the rival is given every advantage that costs it nothing: no bandwidth limit, TCP
//! with BBR where the kernel has it, commands that reach both ends without a round trip, no TLS. A
//! number that is too good for the rival is a fair one.
//!
//! The sequence (libvirt's for `virsh migrate --live --copy-storage-all`): the target starts
//! paused with an empty image of the right size and exports it over NBD; the source mirrors its
//! disk into that; when the mirror is ready, memory is copied; before the switchover the mirror is
//! ended; then the rest, and the target runs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::guest::{Guest, Machine};
use crate::netns::Side;
use crate::qmp::{Event, Qmp};
use crate::wan::Wan;

/// How memory is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// One stream, pages as they are.
    #[default]
    Plain,
    /// Pages that were sent before go as a difference, with QEMU's default cache of 64 MiB.
    Xbzrle,
    /// Several streams, compressed with zstd.
    MultifdZstd,
}

/// What the guest's writes wait for while the disk is mirrored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// Nothing: libvirt's default.
    #[default]
    Background,
    /// The target: `--copy-storage-synchronous-writes`.
    WriteBlocking,
}

/// How the rival moves.
#[derive(Debug, Clone, Serialize, Deserialize, clap::Args)]
pub struct Options {
    /// How memory is sent.
    #[arg(long, value_enum, default_value = "plain")]
    pub memory: Memory,
    /// What the guest's writes wait for while the disk is mirrored.
    #[arg(long, value_enum, default_value = "background")]
    pub copy_mode: CopyMode,
    /// QEMU slows the guest down when memory does not converge.
    #[arg(long)]
    pub auto_converge: bool,
    /// QEMU's downtime limit in ms; 300 is its default.
    #[arg(long, default_value_t = 300)]
    pub downtime_limit_ms: u64,
    /// Seconds after which a move is given up as one that does not converge: the row then says so, and
    /// its times and bytes are lower bounds.
    #[arg(long, default_value_t = 3600)]
    pub give_up_s: u64,
}

/// A versioned machine type that every QEMU of the lab has.
pub const MACHINE: &str = "pc-q35-7.2";
/// A CPU that TCG can be, and that is the same in every QEMU of the lab.
pub const CPU: &str = "qemu64";
/// libvirt's first port for incoming memory, and the next one for the disk.
const MEMORY_PORT: u16 = 49152;
const DISK_PORT: u16 = 49153;
/// libvirt's way to say "no limit" is the largest number; 10 Gbit/s is as far away in this lab.
const BANDWIDTH_BYTES_PER_S: u64 = 1_250_000_000;
/// How long a step without bulk data may take.
const STEP_WAIT: Duration = Duration::from_secs(120);
/// How often a longer wait says how far it is.
const PROGRESS_PERIOD: Duration = Duration::from_secs(5);
/// How long QEMU has to end after `quit`.
const QUIT_WAIT: Duration = Duration::from_secs(20);
/// `multifd-channels` of QEMU and libvirt.
const MULTIFD_CHANNELS: u32 = 2;

/// What a move took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Moved {
    /// From the first command to the mirror being ready.
    pub mirror_s: f64,
    /// From there to the guest's pause.
    pub memory_s: f64,
    /// From there to the guest running at the target.
    pub switchover_s: f64,
    /// All of it, up to the guest running at the target.
    pub total_s: f64,
    /// From `STOP` at the source to `RESUME` at the target, by QEMU's own event times.
    pub downtime_ms: f64,
    /// `query-migrate` of the source at the end.
    pub query_migrate: Value,
}

/// A move that did not get anywhere in the time that it was given: a result, not a failure of the
/// measurement.
#[derive(Debug)]
pub struct GaveUp {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub after: Duration,
}

impl std::fmt::Display for GaveUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "given up: {} did not come within {:?}", self.what, self.after)
    }
}

impl std::error::Error for GaveUp {}

/// A running QEMU process with its monitor. Ends when dropped.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    /// Its monitor.
    pub qmp: Qmp,
}

impl Vm {
    /// Starts a QEMU at one end of the WAN; `is_incoming`: paused, waiting for a move.
    /// Its files (`qmp`, `serial`, `qemu.log`) are in `folder`.
    ///
    /// # Errors
    ///
    /// When it does not start; its own words are in `qemu.log`.
    pub fn start(
        wan: &Wan,
        side: Side,
        qemu: &Path,
        guest: &Guest,
        disk: &Path,
        folder: &Path,
        is_incoming: bool,
    ) -> Result<Self> {
        let log_path = folder.join("qemu.log");
        let log = std::fs::File::create(&log_path)
            .with_context(|| format!("while creating {}", log_path.display()))?;
        let mut command = wan.command(side, qemu);
        command
            .args(machine_arguments(&guest.machine))
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initrd)
            .args(["-append", &guest.machine.append])
            .args(["-blockdev", &disk_option(disk, guest.machine.format.name())])
            .args(["-device", "virtio-blk-pci,drive=disk0,id=vd0"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", folder.join("qmp").display())])
            .args(["-chardev", &serial_option(folder)])
            .args(["-serial", "chardev:serial0"]);
        if is_incoming {
            command.args(["-incoming", "defer", "-S"]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("while starting {}", qemu.display()))?;
        // Killed if its monitor never answers.
        let mut started = Started(Some(child));
        let qmp = Qmp::connect(&folder.join("qmp")).with_context(|| {
            format!("QEMU's own words: {}", std::fs::read_to_string(&log_path).unwrap_or_default())
        })?;
        let child = started.0.take().context("the QEMU process is there until it is taken")?;
        Ok(Self { child, qmp })
    }

    /// Waits until QEMU ended by itself; `false` if it did not in time.
    pub fn wait_gone(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.qmp.execute("quit", json!({}));
            if !self.wait_gone(QUIT_WAIT) {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}

struct Started(Option<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn machine_arguments(machine: &Machine) -> Vec<String> {
    let text = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"];
    let mut arguments: Vec<String> = text.map(str::to_owned).into();
    arguments.extend(["-machine", MACHINE, "-cpu", CPU].map(str::to_owned));
    arguments.extend(["-accel".to_owned(), machine.accel.clone()]);
    arguments.extend(["-m".to_owned(), machine.memory_mib.to_string()]);
    arguments.extend(["-smp".to_owned(), machine.cpus.to_string()]);
    arguments
}

fn disk_option(disk: &Path, format: &str) -> String {
    json!({
        "driver": format,
        "node-name": "disk0",
        "discard": "unmap",
        "file": {"driver": "file", "filename": disk, "discard": "unmap"},
    })
    .to_string()
}

fn serial_option(folder: &Path) -> String {
    format!("socket,id=serial0,path={},server=on,wait=off", folder.join("serial").display())
}

/// Creates the target's empty image: the size that the guest sees, nothing in it.
///
/// # Errors
///
/// When `qemu-img` fails.
pub fn create_target_image(
    qemu_img: &Path,
    format: &str,
    source: &Path,
    target: &Path,
) -> Result<()> {
    let output = Command::new(qemu_img)
        .args(["info", "-U", "--output=json", "-f", format])
        .arg(source)
        .output()
        .with_context(|| format!("while running {}", qemu_img.display()))?;
    let info: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("while reading the size of {}", source.display()))?;
    let bytes = info["virtual-size"].as_u64().context("qemu-img names no virtual size")?;
    let status = Command::new(qemu_img)
        .args(["create", "-q", "-f", format])
        .arg(target)
        .arg(bytes.to_string())
        .status()?;
    ensure!(status.success(), "{} was not created ({status})", target.display());
    Ok(())
}

/// Moves the guest from `source` at side a to `target` at side b; it runs there afterwards.
///
/// # Errors
///
/// [`GaveUp`] when the mirror is not ready or memory does not converge in time: the guest is where it
/// was. Any other when a step fails; the guest may be anywhere then.
pub fn migrate(source: &mut Vm, target: &mut Vm, options: &Options) -> Result<Moved> {
    let begun = Instant::now();
    let give_up = Duration::from_secs(options.give_up_s);
    prepare_target(target, options)?;
    set_up(&mut source.qmp, options, true)?;
    start_mirror(source, options)?;
    wait_mirror(source, give_up)?;
    let mirrored = begun.elapsed();

    let address = Side::B.address();
    source.qmp.execute("migrate", json!({"uri": format!("tcp:{address}:{MEMORY_PORT}")}))?;
    let left = give_up.saturating_sub(begun.elapsed());
    wait_status(&mut source.qmp, "pre-switchover", left)?;
    let stopped = source
        .qmp
        .wait("STOP", STEP_WAIT, |event| (event.name == "STOP").then_some(event.time_s))?;
    end_mirror(source)?;
    source.qmp.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    wait_status(&mut source.qmp, "completed", left)?;
    wait_status(&mut target.qmp, "completed", STEP_WAIT)?;
    target.qmp.execute("nbd-server-stop", json!({}))?;
    target.qmp.execute("cont", json!({}))?;
    let resumed = target
        .qmp
        .wait("RESUME", STEP_WAIT, |event| (event.name == "RESUME").then_some(event.time_s))?;
    let (total_s, mirror_s) = (begun.elapsed().as_secs_f64(), mirrored.as_secs_f64());
    // The pause itself takes a while, and `pre-switchover` comes at its end: `STOP` is the border.
    let switchover_s = resumed - stopped;
    Ok(Moved {
        mirror_s,
        memory_s: total_s - mirror_s - switchover_s,
        switchover_s,
        total_s,
        downtime_ms: switchover_s * 1e3,
        query_migrate: source.qmp.execute("query-migrate", json!({}))?,
    })
}

fn prepare_target(target: &mut Vm, options: &Options) -> Result<()> {
    let qmp = &mut target.qmp;
    let (host, port) = (Side::B.address().to_string(), DISK_PORT.to_string());
    let address = json!({"type": "inet", "data": {"host": host, "port": port}});
    qmp.execute("nbd-server-start", json!({"addr": address}))?;
    qmp.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "export0", "node-name": "disk0", "name": "disk0", "writable": true}),
    )?;
    set_up(qmp, options, false)?;
    qmp.execute("migrate-incoming", json!({"uri": format!("tcp:{host}:{MEMORY_PORT}")}))?;
    Ok(())
}

/// Capabilities and parameters of one end.
fn set_up(qmp: &mut Qmp, options: &Options, is_source: bool) -> Result<()> {
    let is_multifd = options.memory == Memory::MultifdZstd;
    let mut capabilities = vec![("events", true), ("multifd", is_multifd)];
    capabilities.push(("xbzrle", options.memory == Memory::Xbzrle));
    if is_source {
        capabilities.push(("pause-before-switchover", true));
        capabilities.push(("auto-converge", options.auto_converge));
    } else {
        capabilities.push(("late-block-activate", true));
    }
    let list: Vec<Value> = capabilities
        .into_iter()
        .map(|(capability, state)| json!({"capability": capability, "state": state}))
        .collect();
    qmp.execute("migrate-set-capabilities", json!({"capabilities": list}))?;
    let mut parameters = json!({});
    if is_source {
        parameters["max-bandwidth"] = BANDWIDTH_BYTES_PER_S.into();
        parameters["downtime-limit"] = options.downtime_limit_ms.into();
    }
    if is_multifd {
        parameters["multifd-channels"] = MULTIFD_CHANNELS.into();
        parameters["multifd-compression"] = "zstd".into();
    }
    qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

fn start_mirror(source: &mut Vm, options: &Options) -> Result<()> {
    let server = json!({
        "type": "inet", "host": Side::B.address().to_string(), "port": DISK_PORT.to_string(),
    });
    source.qmp.execute(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "target0", "server": server, "export": "disk0",
               "discard": "unmap"}),
    )?;
    source.qmp.execute(
        "blockdev-mirror",
        json!({"job-id": "mirror0", "device": "disk0", "target": "target0", "sync": "full",
               "copy-mode": options.copy_mode}),
    )?;
    Ok(())
}

fn wait_mirror(source: &mut Vm, timeout: Duration) -> Result<()> {
    let end =
        wait_watched(&mut source.qmp, "the ready mirror", timeout, "query-block-jobs", |event| {
            let is_end = matches!(
                event.name.as_str(),
                "BLOCK_JOB_READY"
                    | "BLOCK_JOB_COMPLETED"
                    | "BLOCK_JOB_CANCELLED"
                    | "BLOCK_JOB_ERROR"
            );
            is_end.then(|| (event.name.clone(), event.data.clone()))
        })?;
    ensure!(end.0 == "BLOCK_JOB_READY", "the mirror failed: {} {}", end.0, end.1);
    Ok(())
}

/// To cancel a ready mirror is to end it with a consistent target.
fn end_mirror(source: &mut Vm) -> Result<()> {
    source.qmp.execute("block-job-cancel", json!({"device": "mirror0"}))?;
    let error = source.qmp.wait("the end of the mirror", STEP_WAIT, |event| {
        let is_end = matches!(event.name.as_str(), "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED");
        is_end.then(|| event.data["error"].as_str().map(str::to_owned))
    })?;
    if let Some(error) = error {
        bail!("the mirror ended with: {error}");
    }
    source.qmp.execute("blockdev-del", json!({"node-name": "target0"}))?;
    Ok(())
}

fn wait_status(qmp: &mut Qmp, wanted: &str, timeout: Duration) -> Result<()> {
    let what = format!("migration status {wanted}");
    let choose = |event: &Event| {
        let status = event.data["status"].as_str()?;
        let is_end = status == wanted || matches!(status, "failed" | "cancelled");
        (event.name == "MIGRATION" && is_end).then(|| status.to_owned())
    };
    let status = match wanted {
        // Only here a move may be given up: the guest still runs where it was.
        "pre-switchover" => wait_watched(qmp, &what, timeout, "query-migrate", choose)?,
        _ => qmp.wait(&what, timeout, choose)?,
    };
    if status != wanted {
        let query = qmp.execute("query-migrate", json!({}))?;
        bail!(
            "the migration {status}: {}",
            query["error-desc"].as_str().unwrap_or("no reason given")
        );
    }
    Ok(())
}

/// Waits for an event, and says every few seconds how far it is: what `query` has of numbers.
fn wait_watched<T>(
    qmp: &mut Qmp,
    what: &str,
    timeout: Duration,
    query: &str,
    mut choose: impl FnMut(&Event) -> Option<T>,
) -> Result<T> {
    let begun = Instant::now();
    while begun.elapsed() < timeout {
        let left = timeout.saturating_sub(begun.elapsed());
        if let Some(chosen) = qmp.wait_a_while(left.min(PROGRESS_PERIOD), &mut choose)? {
            return Ok(chosen);
        }
        let state = qmp.execute(query, json!({}))?;
        let state = if state.is_array() { state[0].clone() } else { state };
        let ram = &state["ram"];
        let numbers = [
            ("sent", state["offset"].as_u64().or_else(|| ram["transferred"].as_u64())),
            ("of", state["len"].as_u64().or_else(|| ram["total"].as_u64())),
            ("left", ram["remaining"].as_u64()),
        ];
        let numbers: Vec<String> = numbers
            .iter()
            .filter_map(|(name, bytes)| Some(format!("{name} {} MiB", (*bytes)? >> 20)))
            .collect();
        eprintln!(
            "{:4.0} s: waiting for {what}: {}",
            begun.elapsed().as_secs_f64(),
            numbers.join(", ")
        );
    }
    Err(GaveUp { what: what.to_owned(), after: timeout }.into())
}
