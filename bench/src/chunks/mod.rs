//! What ways of cutting disk images find of one in another, beside other tools on the same pairs.
//!
//! Invariant: a row names the images by their checksums, and no path of a machine.
//!
//! Reading order: [`image`] (what is compared), `cut` (into which pieces), [`scheme`] (how they are
//! looked for), [`micro`] (what could still be found inside missing blocks), [`coding`] (what
//! compression makes of the rest), [`rivals`]; then [`report`] for people. How fast it is: [`speed`] of one
//! core, [`sizes`] of the index.

pub mod coding;
mod cut;
pub mod image;
pub mod micro;
pub mod report;
pub mod rivals;
pub mod scheme;
pub mod sizes;
pub mod speed;

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};

use self::coding::{Coded, compress, compress_in_frames, timed};
use self::image::Image;
use self::rivals::Rival;
use self::scheme::{Known, Scheme};
use crate::row::{self, Made, Revision};

/// Two images: what the target has, and what it shall have.
#[derive(Debug, Args)]
pub struct Pair {
    /// The pair's name, as it shall stand in rows.
    #[arg(long)]
    name: String,
    /// The image that the target has.
    #[arg(long)]
    old: PathBuf,
    /// The image that it shall have.
    #[arg(long)]
    new: PathBuf,
    /// Where rows go.
    #[arg(long)]
    results: PathBuf,
}

/// What to compare.
#[derive(Debug, Args)]
pub struct Plan {
    #[command(flatten)]
    pair: Pair,
    /// Ways of cutting: KIND-SIZE with KIND fixed, fastcdc or blocks, and behind a + how blocks of a
    /// missing piece are looked for: 4k, 4k/N or place.
    #[arg(long, value_delimiter = ',')]
    schemes: Vec<Scheme>,
    /// Levels of zstd, in windows of 128 MiB.
    #[arg(long, value_delimiter = ',', default_value = "3")]
    levels: Vec<i32>,
    /// Also look for small pieces inside missing blocks.
    #[arg(long)]
    micro: bool,
}

/// Which other tools to measure.
#[derive(Debug, Args)]
pub struct RivalPlan {
    #[command(flatten)]
    pair: Pair,
    /// Tools.
    #[arg(long, value_delimiter = ',', value_enum)]
    tools: Vec<Rival>,
    /// Where copies of the images and the tools' stores may lie: several times the images' data.
    #[arg(long)]
    work: PathBuf,
}

/// One scheme or one rival on one pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// When, how, of what and where it was made.
    #[serde(flatten)]
    pub made: Made,
    /// The pair's name.
    pub pair: String,
    /// SHA-256 of the image that the target has, as its build printed it; empty if it did not.
    pub old_sha256: String,
    /// The same of the image that it shall have.
    pub new_sha256: String,
    /// Bytes of the old image in blocks that are not zero.
    pub old_data_bytes: u64,
    /// The same of the new image.
    pub new_data_bytes: u64,
    /// The scheme, or the rival.
    pub tool: String,
    /// A rival's version in its own words.
    #[serde(default)]
    pub tool_version: String,
    /// What came out.
    #[serde(flatten)]
    pub found: Found,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "measurement", rename_all = "snake_case")]
pub enum Found {
    /// Of a scheme.
    Scheme(Box<Figures>),
    /// Of a rival: all that it sends.
    Rival(Coded),
}

/// Figures of a scheme.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Bytes that the target does not have.
    pub missing_bytes: u64,
    /// The same, compressed at each level: `zstd-3`.
    pub coded: Vec<(String, Coded)>,
    /// The same at level 3 in frames of 1 MiB, each by itself.
    #[serde(default)]
    pub in_frames: Option<Coded>,
    /// Pieces of the new image.
    pub pieces: u64,
    /// Bytes of ids, one for each piece.
    pub ids_flat_bytes: u64,
    /// Bytes of ids, with one for each 1 MiB that is the same at the same place.
    pub ids_bytes: u64,
    /// Places in the index of the old image.
    pub entries: u64,
    /// Bytes of these places, empty slots of a table not counted.
    pub index_bytes: u64,
    /// Seconds of one core to cut, hash and index the old image, from memory.
    pub index_cpu_s: f64,
    /// Seconds of one core to cut, hash and look up the new image, from memory.
    pub scan_cpu_s: f64,
    /// With small pieces of the old image's neighbourhood taken out.
    pub near: Option<Rest>,
    /// With small pieces of anywhere in the old image taken out.
    pub anywhere: Option<Rest>,
}

/// What small pieces leave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rest {
    /// Bytes.
    pub missing_bytes: u64,
    /// Bytes of the small pieces' hashes.
    pub hash_bytes: u64,
    /// The rest, compressed at each level.
    pub coded: Vec<(String, Coded)>,
    /// Seconds of one core to cut and look up.
    pub cpu_s: f64,
}

impl Pair {
    fn read(&self) -> Result<(Image, Image)> {
        Ok((Image::read(&self.old)?, Image::read(&self.new)?))
    }

    fn append(
        &self,
        data_bytes: (usize, usize),
        tool: String,
        tool_version: String,
        found: Found,
    ) -> Result<()> {
        let row = Row {
            made: Made::now(&Revision::current()?)?,
            pair: self.name.clone(),
            old_sha256: checksum(&self.old),
            new_sha256: checksum(&self.new),
            old_data_bytes: data_bytes.0 as u64,
            new_data_bytes: data_bytes.1 as u64,
            tool,
            tool_version,
            found,
        };
        eprint!("{}", report::table(std::slice::from_ref(&row)));
        row::append(&self.results, &row)
    }
}

/// What the build wrote down beside an image.
pub(crate) fn checksum(image: &Path) -> String {
    let mut name = image.as_os_str().to_owned();
    name.push(".sha256");
    std::fs::read_to_string(name).unwrap_or_default().trim().to_owned()
}

/// Measures each scheme on the pair and appends a row for each.
///
/// # Errors
///
/// When an image cannot be read or a row not be written.
pub fn run(plan: &Plan) -> Result<()> {
    let (old, new) = plan.pair.read()?;
    for scheme in &plan.schemes {
        let figures = compare(*scheme, &old, &new, &plan.levels, plan.micro)
            .with_context(|| format!("with {scheme}"))?;
        let bytes = (old.data().len(), new.data().len());
        let found = Found::Scheme(Box::new(figures));
        plan.pair.append(bytes, scheme.to_string(), String::new(), found)?;
    }
    Ok(())
}

/// Measures each rival on the pair and appends a row for each.
///
/// # Errors
///
/// When a tool is missing or fails.
pub fn run_rivals(plan: &RivalPlan) -> Result<()> {
    let pair = &plan.pair;
    let bytes = {
        let (old, new) = pair.read()?;
        (old.data().len(), new.data().len())
    };
    for rival in &plan.tools {
        let version = rivals::version(*rival)?;
        let coded = rivals::measure(*rival, &pair.old, &pair.new, &plan.work)?;
        pair.append(bytes, rival.name(), version, Found::Rival(coded))?;
    }
    Ok(())
}

/// What a scheme finds of `new` in `old`.
///
/// # Errors
///
/// When there is no memory to compress the rest.
pub fn compare(
    scheme: Scheme,
    old: &Image,
    new: &Image,
    levels: &[i32],
    micro: bool,
) -> Result<Figures> {
    let (known, index_cpu_s) = timed(|| Known::index(scheme, old));
    let (missing, scan_cpu_s) = timed(|| known.missing(new));
    let (mut near, mut anywhere) = (None, None);
    if micro {
        let hints = &missing.hints;
        let (rest, cpu_s) = timed(|| micro::beyond_near(old, new, &missing.ranges, hints));
        near = Some(Rest::new(new, &rest, levels, cpu_s)?);
        let (rest, cpu_s) = timed(|| micro::beyond_all(old, new, &missing.ranges));
        anywhere = Some(Rest::new(new, &rest, levels, cpu_s)?);
    }
    Ok(Figures {
        missing_bytes: missing.bytes() as u64,
        coded: at_levels(new, &missing.ranges, levels)?,
        in_frames: Some(compress_in_frames(new, &missing.ranges, 3)?),
        pieces: missing.pieces as u64,
        ids_flat_bytes: missing.ids_flat_bytes,
        ids_bytes: missing.ids_bytes,
        entries: known.entries() as u64,
        index_bytes: (known.entries() * longhaul_dedup::index::BYTES_PER_SLOT) as u64,
        index_cpu_s,
        scan_cpu_s,
        near,
        anywhere,
    })
}

impl Rest {
    fn new(new: &Image, rest: &micro::Rest, levels: &[i32], cpu_s: f64) -> Result<Self> {
        Ok(Self {
            missing_bytes: rest.ranges.iter().map(Range::len).sum::<usize>() as u64,
            hash_bytes: rest.hash_bytes,
            coded: at_levels(new, &rest.ranges, levels)?,
            cpu_s,
        })
    }
}

fn at_levels(new: &Image, ranges: &[Range<usize>], levels: &[i32]) -> Result<Vec<(String, Coded)>> {
    let coded = |level: &i32| Ok((format!("zstd-{level}"), compress(new, ranges, *level)?));
    levels.iter().map(coded).collect()
}
