//! The recorded loads that the simulator plays, and the reference figures it is held to.
//!
//! Invariant: what a file says beyond its format is refused with its name and line; nothing is
//! guessed. The files are never part of the tree, so every reader is told their folder.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The ten days of PlanetLab that the consolidation papers use, in March and April 2011.
pub const PLANETLAB_DAYS: [&str; 10] = [
    "20110303", "20110306", "20110309", "20110322", "20110325", "20110403", "20110409", "20110411",
    "20110412", "20110420",
];

/// Samples of a day, one each 5 min.
pub const SAMPLES_PER_DAY: usize = 288;

/// Most VMs of one day that are read; the largest day has 1516.
const VMS_MAX: usize = 100_000;
/// Most bytes of one unpacked trace.
const TRACE_BYTES_MAX: u64 = 1 << 28;

/// One day: of each VM its CPU use as a share of its own size, 0 to 1, one value each 5 min.
#[derive(Debug, Clone, PartialEq)]
pub struct Day {
    /// `20110303`.
    pub name: String,
    /// Of each VM [`SAMPLES_PER_DAY`] values.
    pub vms: Vec<Vec<f64>>,
}

/// Reads one PlanetLab day from `planetlab_DAY.csv.zst` in `folder`.
///
/// # Errors
///
/// When the file is missing, is no zstd, or has a line that is not a VM's number and 288 percentages.
pub fn planetlab(folder: &Path, day: &str) -> Result<Day> {
    let path = folder.join(format!("planetlab_{day}.csv.zst"));
    let file = std::fs::File::open(&path).with_context(|| {
        format!("while opening {}; the traces are not part of the tree", path.display())
    })?;
    let unpacked = zstd::stream::read::Decoder::new(file)
        .with_context(|| format!("while unpacking {}", path.display()))?
        .take(TRACE_BYTES_MAX);
    let mut vms = Vec::new();
    for (number, line) in (1..).zip(BufReader::new(unpacked).lines()) {
        let line = line.with_context(|| format!("while unpacking {}", path.display()))?;
        if number == 1 && line.starts_with("vm") {
            continue;
        }
        ensure!(vms.len() < VMS_MAX, "{}: more than {VMS_MAX} VMs", path.display());
        vms.push(shares(&line).with_context(|| format!("{}:{number}", path.display()))?);
    }
    ensure!(!vms.is_empty(), "{} has no VM", path.display());
    Ok(Day { name: day.to_owned(), vms })
}

/// A VM of Bitbrains: its size and what it used.
#[derive(Debug, Clone, PartialEq)]
pub struct BusinessVm {
    /// Its size in MHz.
    pub mhz: f64,
    /// Its cores.
    pub cores: f64,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// MHz that it used, one value each 5 min.
    pub used: Vec<f64>,
}

impl BusinessVm {
    /// Whether it has CPU and memory at all: the record has some that were never started.
    pub fn is_on(&self) -> bool {
        self.mhz > 0.0 && self.cores > 0.0 && self.memory_mib > 0
    }
}

/// Reads what 500 business VMs used in a month from
/// `bitbrains_rnd_MONTH_cpu_mhz.csv.zst` and `.._vms.csv.zst`. A sample that is missing repeats the one
/// before it.
///
/// # Errors
///
/// When a file is missing, or has a line that is not a VM's number and whole numbers.
pub fn bitbrains(folder: &Path, month: &str) -> Result<Vec<BusinessVm>> {
    let loads = samples(&folder.join(format!("bitbrains_rnd_{month}_cpu_mhz.csv.zst")))?;
    let sizes = table(&folder.join(format!("bitbrains_rnd_{month}_vms.csv.zst")))?;
    ensure!(loads.len() == sizes.len(), "{} loads of {} VMs", loads.len(), sizes.len());
    let days = loads.iter().map(Vec::len).min().unwrap_or(0) / SAMPLES_PER_DAY;
    ensure!(days >= 28, "{month} has {days} days");
    let vm = |(used, fields): (Vec<f64>, Vec<String>)| {
        let number = |at: usize| -> Result<f64> {
            let field = fields.get(at).context("a VM without a size")?;
            field.parse().with_context(|| format!("{field:?} is no size"))
        };
        Ok(BusinessVm { mhz: number(2)?, cores: number(1)?, memory_mib: number(3)? as u64, used })
    };
    loads.into_iter().zip(sizes).map(vm).collect()
}

/// Reads what the same VMs wrote to disk, in KB a second, from
/// `bitbrains_rnd_MONTH_disk_write_kbs.csv.zst`.
///
/// # Errors
///
/// When the file is missing, or has a line that is not a VM's number and whole numbers.
pub fn bitbrains_writes(folder: &Path, month: &str) -> Result<Vec<Vec<f64>>> {
    samples(&folder.join(format!("bitbrains_rnd_{month}_disk_write_kbs.csv.zst")))
}

/// Reads the load of a transatlantic link, bits in each sample, from
/// `wan_transatlantic_isp_2005_5min.csv.zst`.
///
/// # Errors
///
/// When the file is missing, or has a line without a number in its third column.
pub fn transatlantic(folder: &Path) -> Result<Vec<f64>> {
    let path = folder.join("wan_transatlantic_isp_2005_5min.csv.zst");
    let mut load = Vec::new();
    for fields in table(&path)?.iter().skip(1) {
        let field = fields.get(2).with_context(|| format!("{}: short line", path.display()))?;
        load.push(field.parse::<u64>().with_context(|| format!("{field:?} is no load"))? as f64);
    }
    Ok(load)
}

/// Recorded load of a link or a node, in units of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkLoad {
    /// `transatlantic`, `uk`, `abilene`, `abilene ATLAM5`, ..
    pub name: String,
    /// One node of a network whose sum is a series too.
    pub is_part: bool,
    /// Seconds from sample to sample.
    pub sample_s: f64,
    /// The slot that a forecaster of it should have.
    pub slot_s: u32,
    /// The samples.
    pub values: Vec<f64>,
}

/// Seconds from sample to sample of the transatlantic link: its day has 283.19 of them, not 288 as its
/// stamps say.
pub const TRANSATLANTIC_SAMPLE_S: f64 = 86_400.0 / 283.19;

/// Reads the load of all links: transatlantic, the UK's academic backbone, Abilene and GEANT, the last two
/// as a whole and by what enters at each node.
///
/// # Errors
///
/// When a file is missing or has a line that is not of its kind.
pub fn links(folder: &Path) -> Result<Vec<LinkLoad>> {
    let mut all = vec![LinkLoad {
        name: "transatlantic".to_owned(),
        is_part: false,
        sample_s: TRANSATLANTIC_SAMPLE_S,
        slot_s: 300,
        values: transatlantic(folder)?,
    }];
    let mut uk = Vec::new();
    let path = folder.join("wan_uk_academic_2004_5min.csv.zst");
    for (number, fields) in (1..).zip(table(&path)?).skip(1) {
        let field = fields.get(1).map_or("", String::as_str);
        uk.push(load(field).with_context(|| format!("{}:{number}", path.display()))?);
    }
    let (name, is_part) = ("uk".to_owned(), false);
    all.push(LinkLoad { name, is_part, sample_s: 300.0, slot_s: 300, values: uk });
    let abilene = folder.join("wan_abilene_2004-03-01_2weeks_5min.csv.zst");
    all.extend(nodes("abilene", &abilene, 300)?);
    all.extend(nodes("geant", &folder.join("wan_geant_week_15min_kbps.csv.zst"), 900)?);
    Ok(all)
}

/// A matrix `time, A>B, ..`: its sum, and what each node sends to others.
fn nodes(network: &str, path: &Path, sample_s: u32) -> Result<Vec<LinkLoad>> {
    let lines = table(path)?;
    let (head, lines) = lines.split_first().context("an empty matrix")?;
    let of = |name: String, is_part: bool| LinkLoad {
        name,
        is_part,
        sample_s: f64::from(sample_s),
        slot_s: sample_s,
        values: vec![0.0; lines.len()],
    };
    let mut all = vec![of(network.to_owned(), false)];
    let mut places = Vec::new();
    for pair in head.iter().skip(1) {
        let (from, to) = pair.split_once('>').with_context(|| format!("{pair:?} is no pair"))?;
        let name = format!("{network} {from}");
        let known = all.iter().position(|load| load.name == name);
        let place = known.unwrap_or_else(|| {
            all.push(of(name, true));
            all.len() - 1
        });
        places.push((place, from == to));
    }
    for (at, fields) in lines.iter().enumerate() {
        let line = || format!("{}:{}", path.display(), at + 2);
        ensure!(
            fields.len() == head.len(),
            "{}: {} fields, not {}",
            line(),
            fields.len(),
            head.len()
        );
        for (field, (place, stays)) in fields.iter().skip(1).zip(&places) {
            let value = load(field).with_context(line)?;
            all[0].values[at] += value;
            if !stays {
                all[*place].values[at] += value;
            }
        }
    }
    Ok(all)
}

fn load(field: &str) -> Result<f64> {
    let load: f64 = field.parse().with_context(|| format!("{field:?} is no load"))?;
    ensure!(load.is_finite() && load >= 0.0, "{field:?} is no load");
    Ok(load)
}

/// A number and samples on each line. A sample that is missing repeats the one before it.
fn samples(path: &Path) -> Result<Vec<Vec<f64>>> {
    let mut all: Vec<Vec<f64>> = Vec::new();
    for fields in table(path)? {
        let mut one = Vec::with_capacity(fields.len());
        for field in fields.iter().skip(1) {
            let before = one.last().copied().unwrap_or(0.0);
            let value = if field.is_empty() { before } else { f64::from(field.parse::<u32>()?) };
            one.push(value);
        }
        all.push(one);
    }
    Ok(all)
}

/// The fields of each line, without the header if there is one.
fn table(path: &Path) -> Result<Vec<Vec<String>>> {
    let file = std::fs::File::open(path).with_context(|| {
        format!("while opening {}; the traces are not part of the tree", path.display())
    })?;
    let unpacked = zstd::stream::read::Decoder::new(file)
        .with_context(|| format!("while unpacking {}", path.display()))?
        .take(TRACE_BYTES_MAX);
    let mut lines = Vec::new();
    for line in BufReader::new(unpacked).lines() {
        let line = line.with_context(|| format!("while unpacking {}", path.display()))?;
        if lines.is_empty() && line.starts_with("vm") {
            continue;
        }
        ensure!(lines.len() < VMS_MAX, "{}: more than {VMS_MAX} lines", path.display());
        lines.push(line.split(',').map(|field| field.trim().to_owned()).collect());
    }
    ensure!(!lines.is_empty(), "{} is empty", path.display());
    Ok(lines)
}

/// `number,percent,percent,..` as shares.
fn shares(line: &str) -> Result<Vec<f64>> {
    let mut values = Vec::with_capacity(SAMPLES_PER_DAY);
    for field in line.split(',').skip(1) {
        let percent: u32 =
            field.trim().parse().with_context(|| format!("{field:?} is no percentage"))?;
        ensure!(percent <= 100, "{percent} % is more than a VM's own size");
        ensure!(values.len() < SAMPLES_PER_DAY, "more than {SAMPLES_PER_DAY} samples");
        values.push(f64::from(percent) / 100.0);
    }
    ensure!(values.len() == SAMPLES_PER_DAY, "{} samples, not {SAMPLES_PER_DAY}", values.len());
    Ok(values)
}

/// What CloudSim 3.0.3 itself printed for one day and rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// Energy of all hosts in kWh.
    pub energy_kwh: f64,
    /// Migrations started.
    pub migrations: f64,
    /// Share of the hosts' active time in which they gave less than was asked.
    pub slatah: f64,
    /// Share of the asked CPU that was not given during migrations.
    pub pdm: f64,
}

/// Reads the figures of one day and rule (`thr`, `0.8`) from `baseline_cloudsim303_planetlab.csv`.
///
/// # Errors
///
/// When the file cannot be read or has no such line.
pub fn reference(folder: &Path, day: &str, rule: &str, parameter: &str) -> Result<Reference> {
    let path = folder.join("baseline_cloudsim303_planetlab.csv");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("while reading {}", path.display()))?;
    let wanted = [day, rule, parameter, "mmt"];
    let fields = text
        .lines()
        .map(|line| line.split(',').collect::<Vec<_>>())
        .find(|fields| fields.starts_with(&wanted))
        .with_context(|| format!("{} has no {day} {rule} {parameter}", path.display()))?;
    let figure = |at: usize| -> Result<f64> {
        let field = fields.get(at).with_context(|| format!("{}: short line", path.display()))?;
        field.parse().with_context(|| format!("{}: {field:?} is no number", path.display()))
    };
    Ok(Reference {
        energy_kwh: figure(4)?,
        migrations: figure(5)?,
        slatah: figure(7)?,
        pdm: figure(8)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_number_and_a_day_of_percentages() {
        let line = |count: usize, value: &str| "7".to_owned() + &format!(",{value}").repeat(count);
        assert_eq!(shares(&line(SAMPLES_PER_DAY, "50")).unwrap(), vec![0.5; SAMPLES_PER_DAY]);
        for bad in
            [line(287, "1"), line(289, "1"), line(288, "101"), line(288, "-1"), line(288, "x")]
        {
            assert!(shares(&bad).is_err(), "{bad}");
        }
    }
}
