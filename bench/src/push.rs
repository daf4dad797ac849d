//! Images that go to a target without a guest: what crosses the WAN, and what it costs both agents.
//!
//! Invariant: a row is only written of an image that was compared at the target, byte by byte, and
//! names images by their checksums.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agent;
use crate::chunks::coding::Coded;
use crate::chunks::rivals::{self, Rival};
use crate::guest;
use crate::host::{AgentPair, POOL};
use crate::interrupt;
use crate::netns::Side;
use crate::process::{cpu_s, peak_rss_bytes};
use crate::profile::Profile;
use crate::row::{self, Made, Revision};
use crate::trouble::{Cut, Trouble, beset};
use crate::wan::{self, Spec, Wan};

/// What to send.
#[derive(Debug, Clone, clap::Args)]
pub struct Plan {
    /// The images' name, as it shall stand in rows.
    #[arg(long)]
    name: String,
    /// Images that are pushed one after the other, each a row.
    #[arg(long, value_delimiter = ',', required = true)]
    images: Vec<PathBuf>,
    /// Push each under a name of its own instead of in place of the one before.
    #[arg(long)]
    beside: bool,
    /// Do all of that so many times, each with agents and a WAN of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// During each push, cut the WAN once so many MiB have crossed it: MIB:SECONDS; may be repeated.
    #[arg(long = "cut", value_name = "MIB:SECONDS")]
    cuts: Vec<Cut>,
    /// During each push, kill the target's agent once so many MiB have crossed the WAN, and start it
    /// again at once; may be repeated.
    #[arg(long = "kill", value_name = "MIB")]
    kills: Vec<u64>,
    /// Also measure what these send of each image to a target that has the one before it; patches are not
    /// made of the first.
    #[arg(long, value_delimiter = ',', value_enum)]
    rivals: Vec<Rival>,
    /// Decides the WAN's losses; each run has the next.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where copies of the images lie while it runs; the system's own if absent.
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Where rows go.
    #[arg(long)]
    results: PathBuf,
}

/// One image that went to the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// The images' name.
    pub pair: String,
    /// The WAN.
    pub profile: Profile,
    /// Decides the WAN's losses.
    pub seed: u64,
    /// Number of the push, from 1: what was pushed before lies at the target.
    pub step: usize,
    /// Whether it has a name of its own there.
    pub beside: bool,
    /// What was done to it on purpose, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub troubles: Vec<Trouble>,
    /// SHA-256 of the image, as its build printed it; empty if it did not.
    pub image_sha256: String,
    /// From the command to the image having its name, in seconds.
    pub total_s: f64,
    /// IP bytes on the WAN in both directions.
    pub wire_bytes: u64,
    /// The same from source to target, and back; rows before this was counted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes_each: Option<[u64; 2]>,
    /// Those of them that the WAN dropped, in cuts too; rows before this was counted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped_bytes: Option<u64>,
    /// Seconds of processor time of the agents, source and target; of one that was killed, in its last
    /// life.
    pub cpu_s: [f64; 2],
    /// The most memory that each agent has had in its life, in bytes.
    pub peak_rss_bytes: [u64; 2],
    /// What others send, without a WAN and its headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rivals: Vec<Rivalled>,
    /// The product's own report.
    pub report: Value,
}

/// What a rival sends of the same image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rivalled {
    /// The rival.
    pub tool: String,
    /// Its version in its own words.
    pub version: String,
    /// What came out.
    #[serde(flatten)]
    pub coded: Coded,
}

/// Pushes the plan's images over a WAN of `profile`, and appends a row for each.
///
/// # Errors
///
/// When something of the lab or the product fails, or an image arrives as another.
pub fn run(plan: &Plan, profile: &Profile) -> Result<()> {
    let name = format!("push-{}", std::process::id());
    interrupt::notice(|| {
        let _ = wan::down(&format!("push-{}", std::process::id()));
    })?;
    let revision = Revision::current()?;
    // Rivals run in folders of their own.
    let images: Result<Vec<_>, _> = plan.images.iter().map(std::path::absolute).collect();
    let plan = &Plan { images: images?, ..plan.clone() };
    (0..plan.runs).try_for_each(|run| {
        one_run(
            &Plan { seed: plan.seed + u64::from(run), ..plan.clone() },
            profile,
            &revision,
            &name,
        )
    })
}

/// Pushes all images once.
fn one_run(plan: &Plan, profile: &Profile, revision: &Revision, name: &str) -> Result<()> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("lhp-");
    let scratch = match &plan.scratch {
        Some(folder) => builder.tempdir_in(std::path::absolute(folder)?)?,
        None => builder.tempdir()?,
    };
    let folders = Side::BOTH.map(|side| scratch.path().join(side.letter()));
    for folder in &folders {
        std::fs::create_dir(folder)?;
    }
    let qemu = guest::folder_of("setup/qemu", &["10.0"])?;
    let spec =
        Spec { name: name.to_owned(), profile: profile.clone(), seed: plan.seed, stats_file: None };
    let wan = Wan::up(&wan::lab_binary()?, spec)?;
    let mut pair = AgentPair::start(&wan, &folders, [&qemu, &qemu], "tcg")?;
    for (at, image) in plan.images.iter().enumerate() {
        interrupt::check()?;
        let mut row = interrupt::or_came(one(plan, profile, revision, &wan, &mut pair, at, image))
            .with_context(|| format!("while pushing {}", image.display()))?;
        row.rivals = interrupt::or_came(rivalled(plan, at, scratch.path()))?;
        eprintln!(
            "push {}: {:.1} s, {:.2} MiB on the wire, CPU {:.1} + {:.1} s",
            row.step,
            row.total_s,
            row.wire_bytes as f64 / f64::from(1 << 20),
            row.cpu_s[0],
            row.cpu_s[1]
        );
        for rival in &row.rivals {
            let mib = rival.coded.bytes as f64 / f64::from(1 << 20);
            eprintln!("  {}: {mib:.2} MiB, CPU {:.1} s", rival.tool, rival.coded.cpu_s);
        }
        row::append(&plan.results, &row)?;
    }
    Ok(())
}

/// What the rivals make of the image with this number.
fn rivalled(plan: &Plan, at: usize, scratch: &Path) -> Result<Vec<Rivalled>> {
    let nothing = scratch.join("nothing");
    std::fs::write(&nothing, [])?;
    let (old, new) = match at {
        0 => (&nothing, &plan.images[0]),
        _ => (&plan.images[at - 1], &plan.images[at]),
    };
    let tools = plan.rivals.iter().filter(|rival| at > 0 || !rival.is_patch());
    let measure = |rival: &Rival| {
        interrupt::check()?;
        Ok(Rivalled {
            tool: rival.name(),
            version: rivals::version(*rival)?,
            coded: rivals::measure(*rival, old, new, scratch)?,
        })
    };
    tools.map(measure).collect()
}

fn one(
    plan: &Plan,
    profile: &Profile,
    revision: &Revision,
    wan: &Wan,
    pair: &mut AgentPair,
    at: usize,
    image: &Path,
) -> Result<Row> {
    let extension = image.extension().and_then(|end| end.to_str()).unwrap_or("raw");
    let file = match plan.beside {
        true => format!("image-{at}.{extension}"),
        false => format!("image.{extension}"),
    };
    // Its record lies beside an image, and a cache of images is no place for it.
    let own =
        pair.folder(Side::A).join("images").join(image.file_name().context("an image has a name")?);
    if !own.exists() {
        let copied = Command::new("cp")
            .args(["--sparse=always", "--reflink=auto", "--preserve=timestamps"])
            .arg(image)
            .arg(&own)
            .status()?;
        ensure!(copied.success(), "the image cannot be copied");
    }
    let lives = |pair: &AgentPair| Side::BOTH.map(|side| pair.pid(side));
    let (before, pids) = (wan.stats()?, lives(pair));
    let cpu = pids.map(cpu_s);
    let started = Instant::now();
    let source = own.to_str().context("the scratch folder's name is not UTF-8")?;
    let to = format!("{}:{POOL}/{file}", Side::B.letter());
    let troubles = Trouble::in_order(&plan.cuts, &plan.kills);
    let (program, folder) = (pair.program().to_owned(), pair.folder(Side::A).to_owned());
    let push = || agent::ask(&program, &folder, &["push", source, &to, "--replace"]);
    let answer = beset(&troubles, wan, pair, push)?;
    let total_s = started.elapsed().as_secs_f64();
    let after = wan.stats()?;
    let now = lives(pair);
    let cpu = [0, 1].map(|side| match now[side] == pids[side] {
        true => cpu_s(now[side]) - cpu[side],
        false => cpu_s(now[side]),
    });
    let arrived = pair.images(Side::B).join(&file);
    ensure!(is_same(&own, &arrived)?, "the image arrived as another");
    Ok(Row {
        made: Made::now(revision)?,
        pair: plan.name.clone(),
        profile: profile.clone(),
        seed: plan.seed,
        step: at + 1,
        beside: plan.beside,
        troubles,
        image_sha256: crate::chunks::checksum(image),
        total_s,
        wire_bytes: after.wire_bytes() - before.wire_bytes(),
        wire_bytes_each: Some([
            after.a_to_b.sent_bytes - before.a_to_b.sent_bytes,
            after.b_to_a.sent_bytes - before.b_to_a.sent_bytes,
        ]),
        dropped_bytes: Some(after.dropped_bytes() - before.dropped_bytes()),
        cpu_s: cpu,
        peak_rss_bytes: now.map(peak_rss_bytes),
        rivals: Vec::new(),
        report: answer.get("completed").unwrap_or(&answer).clone(),
    })
}

/// Whether two images hold the same, holes not read.
fn is_same(one: &Path, other: &Path) -> Result<bool> {
    let qemu_img = guest::folder_of("setup/qemu", &["10.0"])?.join("bin/qemu-img");
    let compared = Command::new(qemu_img).arg("compare").args([one, other]).output()?;
    Ok(compared.status.success())
}
