//! One measurement, whole: a WAN, a guest under load at one end, a tool that moves it, a verdict, a
//! row.
//!
//! Invariant: a run that fails leaves nothing behind and writes no row; a guest that did not survive
//! is no failure of the run, but a row that says so.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::{self, Format, Guest, Kind};
use crate::host::AgentPair;
use crate::interrupt;
use crate::netns::{self, Side};
use crate::profile::Profile;
use crate::rival;
use crate::row::{self, Made, Revision, Row};
use crate::wan::{self, Spec, Wan};
use crate::warm::Warm;
use crate::watch::{Verdict, Watch};

/// What moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tool {
    /// Longhaul.
    Longhaul,
    /// QEMU alone, as libvirt drives it.
    Qemu,
}

/// A measurement.
#[derive(Debug, Clone, clap::Args)]
pub struct Plan {
    /// What moves the guest.
    #[arg(long, value_enum)]
    pub tool: Tool,
    /// Which guest.
    #[arg(long, value_enum, default_value = "tiny")]
    pub guest: Kind,
    /// How its disk is encoded, at both ends.
    #[arg(long, value_enum, default_value = "raw")]
    pub format: Format,
    /// Memory in MiB; the guest's own default if absent.
    #[arg(long)]
    pub memory_mib: Option<u32>,
    /// Virtual CPUs; the guest's own default if absent.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// More of the kernel's command line: the load, such as `survivor.dirty_mib_s=8`.
    #[arg(long, default_value = "")]
    pub append: String,
    /// QEMU's accelerator.
    #[arg(long, default_value = "tcg")]
    pub accel: String,
    /// Which QEMU: 7.2 or 10.0. Under TCG, 7.2 misses writes when memory moves slowly: QEMU alone
    /// (a local `migrate` with max-bandwidth 20 MB/s) left a panicking guest in 6 of 6 tries, 10.0
    /// in none of 3.
    #[arg(long, default_value = "10.0")]
    pub qemu: String,
    /// Which QEMU at the target; the same if absent.
    #[arg(long)]
    pub qemu_target: Option<String>,
    /// How many runs; the n-th one has the WAN's seed plus n - 1.
    #[arg(long, default_value_t = 1)]
    pub runs: u32,
    /// Decides the WAN's losses in the first run.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seconds under load before the move, and again after it.
    #[arg(long, default_value_t = 10)]
    pub load_s: u64,
    /// Longhaul only: seed the disk ahead and wait this many minutes before the move.
    #[arg(long)]
    pub seed_minutes: Option<f64>,
    /// Options of the rival.
    #[command(flatten)]
    pub rival: rival::Options,
    /// Show the product's own progress and report, and the guest's verdict, to whoever watches.
    #[arg(long)]
    pub show: bool,
    /// Where rows are appended.
    #[arg(long)]
    pub results: PathBuf,
    /// Folder for images and logs of the runs, removed afterwards; the system's own if absent.
    #[arg(long)]
    pub scratch: Option<PathBuf>,
    /// Keep that folder.
    #[arg(long)]
    pub keep: bool,
}

/// How long a guest may take to power off.
const POWER_OFF_WAIT: Duration = Duration::from_secs(120);

/// What a tool did.
#[derive(Debug)]
struct Outcome {
    variant: String,
    version: String,
    phases_s: BTreeMap<String, f64>,
    total_s: f64,
    downtime_ms: f64,
    report: Value,
    images: [PathBuf; 2],
    wire: crate::relay::Stats,
    verdict: Verdict,
}

/// Everything that a tool needs to move a guest.
struct Stage<'a> {
    wan: &'a Wan,
    plan: &'a Plan,
    guest: &'a Guest,
    /// The folder with `bin/qemu-system-x86_64` and its tools, of each side.
    qemus: &'a [PathBuf; 2],
    /// A folder for each side.
    folders: [PathBuf; 2],
}

/// Does all runs of a plan over the WAN `profile`, and says on stderr how each one went.
///
/// # Errors
///
/// The first run that fails.
pub fn run(plan: &Plan, profile: &Profile) -> Result<()> {
    let mut guest = Guest::build(plan.guest)?;
    guest.machine.format = plan.format;
    guest.machine.memory_mib = plan.memory_mib.unwrap_or(guest.machine.memory_mib);
    guest.machine.cpus = plan.cpus.unwrap_or(guest.machine.cpus);
    guest.machine.accel.clone_from(&plan.accel);
    if !plan.append.is_empty() {
        guest.machine.append = format!("{} {}", guest.machine.append, plan.append);
    }
    let qemu = guest::folder_of("setup/qemu", &[&plan.qemu])?;
    let qemu_target = match &plan.qemu_target {
        Some(version) => guest::folder_of("setup/qemu", &[version])?,
        None => qemu.clone(),
    };
    let qemus = [qemu, qemu_target];
    let revision = Revision::current()?;
    interrupt::notice(|| {
        // With the WAN everything in its namespaces ends: hypervisors, agents, and so every wait.
        let _ = wan::down(&wan_name());
    })?;
    for run in 1..=plan.runs {
        let seed = plan.seed + u64::from(run - 1);
        let row = interrupt::or_came(one(plan, profile, &guest, &qemus, &revision, run, seed))
            .with_context(|| format!("in run {run} of {}", plan.runs))?;
        eprintln!(
            "run {run}: {:.1} s, downtime {:.0} ms, gap {:.0} ms, {:.1} MiB on the wire, guest {}",
            row.total_s,
            row.downtime_ms,
            row.verdict.gap_ms.unwrap_or(f64::NAN),
            row.wire_bytes as f64 / f64::from(1 << 20),
            if row.verdict.ok { "well".to_owned() } else { row.verdict.why.join("; ") },
        );
        if plan.show {
            show(&row);
        }
        row::append(&plan.results, &row)?;
    }
    Ok(())
}

/// Runs follow each other: one name for each process that measures.
fn wan_name() -> String {
    format!("run-{}", std::process::id())
}

fn one(
    plan: &Plan,
    profile: &Profile,
    guest: &Guest,
    qemus: &[PathBuf; 2],
    revision: &Revision,
    run: u32,
    seed: u64,
) -> Result<Row> {
    // Short: unix sockets lie in it, and their paths have 107 bytes at most.
    let mut builder = tempfile::Builder::new();
    builder.prefix("lh-").disable_cleanup(plan.keep);
    let scratch = match &plan.scratch {
        Some(folder) => builder.tempdir_in(std::path::absolute(folder)?)?,
        None => builder.tempdir()?,
    };
    let folders = Side::BOTH.map(|side| scratch.path().join(side.letter()));
    for folder in &folders {
        std::fs::create_dir(folder)?;
    }
    if plan.keep {
        eprintln!("run {run}: images and logs in {}", scratch.path().display());
    }
    interrupt::check()?;
    let name = wan_name();
    let spec = Spec { name: name.clone(), profile: profile.clone(), seed, stats_file: None };
    let wan = Wan::up(&wan::lab_binary()?, spec)?;
    let stage = Stage { wan: &wan, plan, guest, qemus, folders };
    let outcome = match plan.tool {
        Tool::Qemu => stage.qemu()?,
        Tool::Longhaul => stage.longhaul()?,
    };
    let [source_image_bytes, target_image_bytes] =
        outcome.images.map(|path| allocated_bytes(&path));
    Ok(Row {
        made: Made::now(revision)?,
        tool: match plan.tool {
            Tool::Longhaul => "longhaul".to_owned(),
            Tool::Qemu => "qemu".to_owned(),
        },
        variant: outcome.variant,
        tool_version: outcome.version,
        profile: profile.clone(),
        tcp_congestion_control: netns::congestion_control(&name, Side::A)?,
        seed,
        run,
        guest: guest.machine.clone(),
        phases_s: outcome.phases_s,
        total_s: outcome.total_s,
        downtime_ms: outcome.downtime_ms,
        wire_bytes: outcome.wire.wire_bytes(),
        wire: outcome.wire,
        source_image_bytes,
        target_image_bytes,
        verdict: outcome.verdict,
        report: outcome.report,
    })
}

impl Stage<'_> {
    fn program(&self, side: Side, name: &str) -> PathBuf {
        self.qemus[side as usize].join("bin").join(name)
    }

    /// Memory for what a move will fill at its target, to be given back just before it.
    fn warm_memory(&self) -> Result<Warm> {
        let memory = u64::from(self.guest.machine.memory_mib) << 20;
        // Beside the guest's own: what a tool keeps of it, and the image in the page cache.
        Warm::touch(memory, memory + allocated_bytes(&self.guest.disk))
    }

    /// Lets the load run for a while, so that the guest is not moved while it still settles.
    fn settle(&self, watch: &mut Watch) -> Result<()> {
        watch.wait_ready(Side::A)?;
        interrupt::sleep(Duration::from_secs(self.plan.load_s))?;
        watch.forget_gap(Side::A)
    }

    /// Lets the guest live at the target for a while (its load must go on there), asks it for a
    /// full proof and powers it off.
    fn prove(&self, watch: &mut Watch) -> Result<()> {
        watch.wait_alive(Side::B)?;
        interrupt::sleep(Duration::from_secs(self.plan.load_s))?;
        watch.prove(Side::B)?;
        watch.power_off(Side::B)
    }

    fn qemu(&self) -> Result<Outcome> {
        let (plan, [a, b]) = (self.plan, &self.folders);
        let source_image = self.guest.copy_disk(a)?;
        let mut watch =
            Watch::start(a, &[(Side::A, a.join("serial")), (Side::B, b.join("serial"))])?;
        let start = |side, disk: &Path, folder: &Path, is_incoming| {
            let system = self.program(side, "qemu-system-x86_64");
            rival::Vm::start(self.wan, side, &system, self.guest, disk, folder, is_incoming)
        };
        let mut source = start(Side::A, &source_image, a, false)?;
        let warm = self.warm_memory()?;
        self.settle(&mut watch)?;
        let format = plan.format.name();
        let target_image = b.join(format!("disk.{format}"));
        rival::create_target_image(
            &self.program(Side::B, "qemu-img"),
            format,
            &source_image,
            &target_image,
        )?;
        let mut target = start(Side::B, &target_image, b, true)?;

        drop(warm);
        let begun = Instant::now();
        let moved = match rival::migrate(&mut source, &mut target, &plan.rival) {
            Err(error) if error.is::<rival::GaveUp>() => {
                let (total, images) = (begun.elapsed(), [source_image, target_image]);
                return self.given_up(&error.to_string(), total, images);
            }
            moved => moved?,
        };
        let wire = self.wan.stats()?;
        self.prove(&mut watch)?;
        ensure!(target.wait_gone(POWER_OFF_WAIT), "the guest does not power off");
        drop(source);
        let verdict = watch.end(Side::B, &[&target_image])?;
        Ok(Outcome {
            variant: self.rival_variant()?,
            version: version(&self.program(Side::A, "qemu-system-x86_64"))?,
            phases_s: BTreeMap::from([
                ("mirror".to_owned(), moved.mirror_s),
                ("memory".to_owned(), moved.memory_s),
                ("switchover".to_owned(), moved.switchover_s),
            ]),
            total_s: moved.total_s,
            downtime_ms: moved.downtime_ms,
            report: serde_json::to_value(&moved)?,
            images: [source_image, target_image],
            wire,
            verdict,
        })
    }

    fn rival_variant(&self) -> Result<String> {
        let options = &self.plan.rival;
        Ok(format!(
            "{} {}{}",
            serde_plain(&options.memory)?,
            serde_plain(&options.copy_mode)?,
            if options.auto_converge { " auto-converge" } else { "" }
        ))
    }

    /// What is known of a move that the rival did not bring to its end.
    fn given_up(&self, why: &str, total: Duration, images: [PathBuf; 2]) -> Result<Outcome> {
        Ok(Outcome {
            variant: self.rival_variant()?,
            version: version(&self.program(Side::A, "qemu-system-x86_64"))?,
            phases_s: BTreeMap::new(),
            total_s: total.as_secs_f64(),
            downtime_ms: 0.0,
            report: serde_json::json!({"given_up": why}),
            images,
            wire: self.wan.stats()?,
            verdict: Verdict { ok: false, why: vec![why.to_owned()], ..Verdict::default() },
        })
    }

    fn longhaul(&self) -> Result<Outcome> {
        let (plan, [a, _]) = (self.plan, &self.folders);
        let pair = AgentPair::start(
            self.wan,
            &self.folders,
            self.qemus.each_ref().map(PathBuf::as_path),
            &plan.accel,
        )?;
        let source_image = self.guest.copy_disk(&pair.images(Side::A))?;
        let consoles = Side::BOTH.map(|side| (side, pair.console(side)));
        let mut watch = Watch::start(a, &consoles)?;
        pair.start_vm(self.guest, &source_image)?;
        let mut warm = self.warm_memory()?;
        self.settle(&mut watch)?;
        let mut phases_s = BTreeMap::new();
        if let Some(minutes) = plan.seed_minutes {
            drop(warm);
            let begun = Instant::now();
            pair.seed()?;
            phases_s.insert("seed".to_owned(), begun.elapsed().as_secs_f64());
            interrupt::sleep(Duration::from_secs_f64(minutes * 60.0))?;
            warm = self.warm_memory()?;
            watch.forget_gap(Side::A)?;
        }
        drop(warm);
        let begun = Instant::now();
        let report = if plan.show { pair.migrate_shown()? } else { pair.migrate()? };
        let total_s = begun.elapsed().as_secs_f64();
        let wire = self.wan.stats()?;
        self.prove(&mut watch)?;
        pair.wait_vm_gone(Side::B, POWER_OFF_WAIT)?;
        let name = source_image.file_name().context("the copy has a name")?;
        let target_image = pair.images(Side::B).join(name);
        let verdict = watch.end(Side::B, &[&target_image])?;
        for phase in report["phases"].as_array().map(Vec::as_slice).unwrap_or_default() {
            if let (Some(name), Some(ms)) = (phase[0].as_str(), phase[1]["duration_ms"].as_f64()) {
                phases_s.insert(name.to_owned(), ms / 1e3);
            }
        }
        Ok(Outcome {
            variant: if plan.seed_minutes.is_some() { "seeded".to_owned() } else { String::new() },
            version: version(pair.program())?,
            phases_s,
            total_s,
            downtime_ms: report["downtime"]["total_ms"].as_f64().unwrap_or(f64::NAN),
            report,
            images: [source_image, target_image],
            wire,
            verdict,
        })
    }
}

/// Says what came of a move, for whoever watched it.
fn show(row: &Row) {
    let verdict = &row.verdict;
    let gap = verdict.gap_ms.map_or_else(|| "not seen".to_owned(), |ms| format!("{ms:.0} ms"));
    eprintln!("\nThe guest's own verdict: {}", if verdict.ok { "well" } else { "NOT WELL" });
    for why in &verdict.why {
        eprintln!("  {why}");
    }
    eprintln!("  longest gap of its heartbeat across the move  {gap}");
    eprintln!("  downtime as longhaul reported it              {:.0} ms", row.downtime_ms);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    eprintln!(
        "  image on disk: {:.0} MiB at the source, {:.0} MiB at the target",
        mib(row.source_image_bytes),
        mib(row.target_image_bytes)
    );
    eprintln!("  all of it: {}", verdict.full);
}

/// The word that serde writes for a plain enum.
fn serde_plain(value: &impl serde::Serialize) -> Result<String> {
    let value = serde_json::to_value(value)?;
    value.as_str().map(str::to_owned).context("not a plain enum")
}

/// First line of `PROGRAM --version`.
fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("while running {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Bytes that a file occupies, holes not counted; 0 if it is gone.
fn allocated_bytes(path: &Path) -> u64 {
    // POSIX counts blocks of 512 bytes here, whatever the file system's are.
    std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}
