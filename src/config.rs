//! `agent.toml`: what was typed becomes what it means.
//!
//! Invariant: a [`Config`] is whole and valid; nothing after this file checks a setting again. What
//! is wrong is refused with the file, the line and a remedy. Order of precedence: defaults, then the
//! file, then [`Overrides`] from the command line.

mod scheduler;
mod typed;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::tz::TimeZone;
use toml::Spanned;

use crate::calendar::RateCalendar;
use crate::hypervisor::qemu::image::ImageTools;
use crate::hypervisor::spec::host::HostPolicy;
use crate::units::ByteCount;
pub use scheduler::{SchedulerConfig, VmRules};
use typed::{NetworkTyped, Typed};

/// Where the configuration lies unless the operator says otherwise.
pub const DEFAULT_FILE: &str = "/etc/longhaul/agent.toml";
/// Where an agent keeps what must survive a restart.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/longhaul";
/// Where an agent keeps sockets and whatever may vanish with a reboot.
pub const DEFAULT_RUN_DIR: &str = "/run/longhaul";
/// The UDP port that agents listen on.
pub const DEFAULT_PORT: u16 = 4873;
/// How an address for peers is written.
const LISTEN_EXAMPLE: &str = "0.0.0.0:4873";
/// Longest name of a host, peer, pool, network or VM, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Largest configuration file: one larger than this is some other file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Downtime limits that make sense: below no migration could ever finish, as the pause itself takes
/// some milliseconds; above is no live migration.
pub const DOWNTIME_LIMIT_MS: RangeInclusive<u64> = 5..=600_000;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file does not exist.
    #[error("{} does not exist; `longhaul init` writes one", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
    },
    /// The file could not be read.
    #[error("cannot read {}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("{} is larger than 1 MiB: not a configuration of longhaul", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// A line of the file, or a flag, is wrong; `remedy` says what to write instead.
    #[error("{place}: {problem}; {remedy}")]
    Wrong {
        /// `file:line`, or the flag.
        place: String,
        /// What is wrong.
        problem: String,
        /// What to write instead.
        remedy: String,
    },
}

/// Everything that an agent needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This host's name, as its peers will show it.
    pub name: String,
    /// UDP address for peers.
    pub listen: SocketAddr,
    /// What must survive a restart: identity, peers, VM descriptions, journals, history.
    pub state_dir: PathBuf,
    /// Sockets of the running agent and of its VMs.
    pub run_dir: PathBuf,
    /// Peers that may fetch images from this host's pools.
    pub serves: Vec<String>,
    /// How VMs are run, and what they may use.
    pub host: HostPolicy,
    /// QEMU's programs for images.
    pub image_tools: ImageTools,
    /// Bounds on what the agent takes from the host.
    pub limits: Limits,
    /// Programs around the switchover.
    pub hooks: HookConfig,
    /// TCP address at which numbers are served over HTTP, to anybody who reaches it; nowhere without it.
    pub metrics_listen: Option<SocketAddr>,
    /// Who plans, for whom, and by which rules.
    pub scheduler: SchedulerConfig,
}

/// Bounds on what the agent takes from the host and the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Cap on what all jobs together send.
    pub rate: RateCalendar,
    /// The zone whose clocks caps follow.
    pub time_zone: TimeZone,
    /// Memory for staging pages and chunks, over all jobs.
    pub memory: ByteCount,
    /// Downtime that a migration may take unless its command says otherwise.
    pub downtime: Duration,
    /// How long a job waits for a link that is down, before the hand-over.
    pub link_patience: Duration,
}

/// Programs that run around the switchover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookConfig {
    /// Runs before the pause; its failure aborts the migration.
    pub before_switchover: Option<PathBuf>,
    /// Runs after the hand-over; its failure is reported.
    pub after_switchover: Option<PathBuf>,
    /// Runs before a guest is taken back without the target's word; its failure prevents that.
    pub fence: Option<PathBuf>,
    /// Time that one run may take.
    pub timeout: Duration,
}

/// Settings from the command line; they win over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Replaces `agent.name`.
    pub name: Option<String>,
    /// Replaces `agent.listen`.
    pub listen: Option<SocketAddr>,
    /// Replaces `agent.state_dir`.
    pub state_dir: Option<PathBuf>,
    /// Replaces `agent.run_dir`.
    pub run_dir: Option<PathBuf>,
}

impl Config {
    /// Reads and checks `file`.
    ///
    /// # Errors
    /// The file is missing, unreadable or says something that cannot be.
    pub fn load(file: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { file: file.to_owned(), source };
        let size = match std::fs::metadata(file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ConfigError::Missing { file: file.to_owned() });
            }
            Err(error) => return Err(unreadable(error)),
        };
        if size > FILE_BYTES_MAX {
            return Err(ConfigError::TooLarge { file: file.to_owned() });
        }
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        Self::parse(file, &text, overrides)
    }

    /// Checks `text` as if it had been read from `file`.
    ///
    /// # Errors
    /// The text says something that cannot be.
    pub fn parse(file: &Path, text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        let source = Source { file, text };
        let typed: Typed = toml::from_str(text).map_err(|error| ConfigError::Wrong {
            place: source.place(error.span().map_or(0, |span| span.start)),
            problem: error.message().trim().replace('\n', ", "),
            remedy: "correct or remove that line (`longhaul init` writes an example)".to_owned(),
        })?;
        let name = match (&overrides.name, &typed.agent.name) {
            (Some(name), _) => {
                valid_name(name).map(|()| name.clone()).map_err(|p| flag("--name", p))?
            }
            (None, name) => source.checked(name, |name| valid_name(name).map(|()| name.clone()))?,
        };
        let listen = match (overrides.listen, typed.agent.listen) {
            (Some(listen), _) => listen,
            (None, Some(listen)) => {
                source.checked(&listen, |text| parse_listen(text, LISTEN_EXAMPLE))?
            }
            (None, None) => SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        };
        let dir = |flag: &Option<PathBuf>, typed: &Option<Spanned<PathBuf>>, default: &str| match (
            flag, typed,
        ) {
            (Some(dir), _) => Ok(dir.clone()),
            (None, Some(dir)) => source.checked(dir, |dir| absolute(dir)),
            (None, None) => Ok(PathBuf::from(default)),
        };
        let run_dir = dir(&overrides.run_dir, &typed.agent.run_dir, DEFAULT_RUN_DIR)?;
        Ok(Self {
            scheduler: typed.scheduler.meaning(&source, &name)?,
            name,
            listen,
            state_dir: dir(&overrides.state_dir, &typed.agent.state_dir, DEFAULT_STATE_DIR)?,
            run_dir: run_dir.clone(),
            serves: source.names(&typed.agent.serves)?,
            image_tools: ImageTools {
                qemu_img: typed.qemu.img.clone().unwrap_or_else(|| "qemu-img".into()),
                qemu_nbd: typed.qemu.nbd.clone().unwrap_or_else(|| "qemu-nbd".into()),
                run_dir: run_dir.join("nbd"),
            },
            host: HostPolicy {
                run_dir: run_dir.join("vm"),
                pools: source.entries(&typed.pools, |dir: &PathBuf| absolute(dir))?,
                networks: source.entries(&typed.networks, NetworkTyped::meaning)?,
                firmware: source.entries(&typed.firmware, |file: &PathBuf| absolute(file))?,
                ..typed.qemu.meaning(&source)?
            },
            limits: typed.limits.meaning(&source)?,
            hooks: typed.hooks.meaning(&source)?,
            metrics_listen: typed.metrics.meaning(&source)?,
        })
    }

    /// The socket that commands reach the agent through.
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.run_dir)
    }
}

/// The number of the line that holds the byte at `offset`.
pub fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// The control socket of an agent with this `run_dir`.
pub fn control_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// Whether `name` can name a host, peer, pool, network or VM: it becomes part of file names, so it
/// is a letter or digit followed by letters, digits, `-`, `_` and `.`.
///
/// # Errors
/// The name is not like that.
pub fn valid_name(name: &str) -> Result<(), Problem> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_BYTES_MAX && name.chars().all(plain) {
        return Ok(());
    }
    Err(Problem {
        what: format!("`{}` is not a name", name.escape_debug()),
        remedy: format!(
            "use up to {NAME_BYTES_MAX} letters, digits, `-`, `_` or `.`, starting with a letter or digit"
        ),
    })
}

/// Whether a migration may be asked for this downtime.
///
/// # Errors
/// It is outside of [`DOWNTIME_LIMIT_MS`].
pub fn valid_downtime_limit(ms: u64) -> Result<u64, Problem> {
    if DOWNTIME_LIMIT_MS.contains(&ms) {
        return Ok(ms);
    }
    let (min, max) = DOWNTIME_LIMIT_MS.into_inner();
    Err(problem(format!("a downtime limit of {ms} ms cannot be"), format!("use {min} to {max}")))
}

/// A value that cannot be, apart from where it was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to write instead.
    pub remedy: String,
}

fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { what: what.into(), remedy: remedy.into() }
}

fn flag(flag: &str, problem: Problem) -> ConfigError {
    ConfigError::Wrong { place: flag.to_owned(), problem: problem.what, remedy: problem.remedy }
}

fn absolute(dir: &Path) -> Result<PathBuf, Problem> {
    if dir.is_absolute() {
        return Ok(dir.to_owned());
    }
    Err(problem(format!("`{}` is not an absolute path", dir.display()), "start it with `/`"))
}

fn parse_listen(text: &str, example: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        let remedy = format!("write e.g. \"{example}\"; an IPv6 address stands in brackets");
        problem(format!("`{text}` is not an address and port"), remedy)
    })
}

/// Turns positions in the file into lines.
struct Source<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, offset: usize) -> String {
        format!("{}:{}", self.file.display(), line_of(self.text, offset))
    }

    fn wrong(&self, offset: usize, problem: Problem) -> ConfigError {
        let Problem { what, remedy } = problem;
        ConfigError::Wrong { place: self.place(offset), problem: what, remedy }
    }

    fn checked<T, U>(
        &self,
        value: &Spanned<T>,
        meaning: impl Fn(&T) -> Result<U, Problem>,
    ) -> Result<U, ConfigError> {
        meaning(value.get_ref()).map_err(|problem| self.wrong(value.span().start, problem))
    }

    /// Checks a list of names.
    fn names(&self, list: &[Spanned<String>]) -> Result<Vec<String>, ConfigError> {
        let name = |name: &String| valid_name(name).map(|()| name.clone());
        list.iter().map(|typed| self.checked(typed, name)).collect()
    }

    /// Checks a table whose keys are names.
    fn entries<T, U>(
        &self,
        table: &BTreeMap<String, Spanned<T>>,
        meaning: impl Fn(&T) -> Result<U, Problem>,
    ) -> Result<BTreeMap<String, U>, ConfigError> {
        let entry = |(name, value): (&String, &Spanned<T>)| {
            let value = self.checked(value, |value| {
                valid_name(name)?;
                meaning(value)
            })?;
            Ok((name.clone(), value))
        };
        table.iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests;
