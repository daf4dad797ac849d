//! `longhaul init`: a configuration, folders and an identity.
//!
//! Invariant: nothing that exists is overwritten; run twice, the second refuses and changes nothing.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use longhaul_transport::{Fingerprint, Identity, IdentityError};

use crate::config::{
    Config, ConfigError, DEFAULT_FILE, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Overrides,
};

/// Why a host could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// It is set up already.
    #[error("{} exists already, nothing was changed", .0.display())]
    Exists(PathBuf),
    /// The name, typed or the host's own, cannot be one.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file or folder could not be made.
    #[error("cannot make {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The identity could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A host that is ready for its agent.
#[derive(Debug)]
pub struct Prepared {
    /// The configuration that was written.
    pub file: PathBuf,
    /// What it says.
    pub config: Config,
    /// Who the host is now.
    pub fingerprint: Fingerprint,
    /// Whether the configuration lies where commands look by default.
    pub is_default_place: bool,
}

/// Sets this host up: below `dir`, or in the places where a service has its files.
///
/// # Errors
/// It is set up already, or something could not be made.
pub fn init(
    dir: Option<&Path>,
    file: Option<&Path>,
    name: Option<&str>,
    listen: SocketAddr,
) -> Result<Prepared, SetupError> {
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| SetupError::Io { path, source }
    };
    let dir = dir.map(|dir| std::path::absolute(dir).map_err(io_error(dir))).transpose()?;
    let below = |name: &str, default: &str| match &dir {
        Some(dir) => dir.join(name),
        None => PathBuf::from(default),
    };
    let file = file.map_or_else(|| below("agent.toml", DEFAULT_FILE), Path::to_owned);
    let state_dir = below("state", DEFAULT_STATE_DIR);
    let run_dir = below("run", DEFAULT_RUN_DIR);
    let images = dir.as_ref().map_or_else(|| state_dir.join("images"), |dir| dir.join("images"));
    if file.exists() {
        return Err(SetupError::Exists(file));
    }
    let name = name.map_or_else(host_name, str::to_owned);
    let text = template(&name, listen, &state_dir, &run_dir, &images);
    // Whatever cannot be right is refused before anything is made.
    let overrides = Overrides { name: Some(name), ..Overrides::default() };
    let config = Config::parse(&file, &text, &overrides)?;

    for dir in [&state_dir, &run_dir, &images] {
        make_dir(dir).map_err(io_error(dir))?;
    }
    let fingerprint = Identity::load_or_create(&state_dir)?.fingerprint();
    if let Some(parent) = file.parent() {
        make_dir(parent).map_err(io_error(parent))?;
    }
    // Last, so that a second try finds nothing to refuse if this one was cut short.
    let mut options = OpenOptions::new();
    let written = options.write(true).create_new(true).mode(0o644).open(&file);
    written.and_then(|mut file| file.write_all(text.as_bytes())).map_err(io_error(&file))?;
    let is_default_place = file == Path::new(DEFAULT_FILE);
    Ok(Prepared { file, config, fingerprint, is_default_place })
}

/// Makes a folder that only its owner can enter.
pub(crate) fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// What the operator does next.
pub fn next_steps(prepared: &Prepared) -> String {
    let Prepared { file, config, fingerprint, is_default_place } = prepared;
    let mut text = format!(
        "{} is set up: {}\nfingerprint {fingerprint}\n\nNext:\n  look through {}\n",
        config.name,
        config.state_dir.display(),
        file.display(),
    );
    if !is_default_place {
        text += &format!("  export LONGHAUL_CONFIG={}\n", file.display());
    }
    text += "  longhaul agent               in the background, or as a service
  longhaul pair                on both hosts; type on each what the other shows
  longhaul vm start FILE       or `longhaul vm adopt` for one that runs already
  longhaul migrate VM --to PEER
";
    text
}

/// This host's own name up to its first dot, as far as it can name an agent.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-';
    let name: String = name.chars().take_while(plain).collect();
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { "host".to_owned() }
}

fn template(
    name: &str,
    listen: SocketAddr,
    state_dir: &Path,
    run_dir: &Path,
    images: &Path,
) -> String {
    // As TOML strings, whatever is in them.
    let quoted = |text: &dyn std::fmt::Display| toml::Value::String(text.to_string()).to_string();
    let path = |path: &Path| quoted(&path.display());
    format!(
        r#"# Configuration of a longhaul agent. Lines that begin with # show defaults or examples.

[agent]
# This host's name, as its peers show it.
name = {name}
# UDP address for peers. The port must be reachable from them.
listen = {listen}
# What must survive a restart: identity, peers, VM descriptions, journals, history.
state_dir = {state_dir}
# Sockets of the running agent and of its VMs.
run_dir = {run_dir}
# Peers that may fetch any image of the pools with `longhaul pull`, by their names here. Nobody without it.
# serves = ["lyon"]

[qemu]
# Programs: names on PATH, or absolute paths.
# system = "qemu-system-x86_64"
# img = "qemu-img"
# nbd = "qemu-nbd"
# Who executes the guest's instructions: "kvm", "tcg", or "auto" for KVM where it works.
# accel = "auto"
# Take rights away from QEMU that it does not need (its seccomp sandbox).
# sandbox = true
# Largest VM that may start or arrive here.
# vcpus_max = 64
# memory_max = "256G"

[pools]
# Folders for disk images, by the names that VM descriptions use. Nothing outside them is ever
# written on behalf of a peer. A disk that its source names by a path belongs to `default`.
default = {images}

[networks]
# What NICs are attached to, by the names that VM descriptions use. Equal names at both hosts
# should mean equal networks.
# lan = {{ bridge = "br0" }}
# routed = {{ tap_script = "/etc/longhaul/tap-up", vhost = true }}
nat = {{ user = true }}
unplugged = {{ none = true }}

[firmware]
# UEFI firmware in flash, by the names that VM descriptions use.
# ovmf = "/usr/share/OVMF/OVMF_CODE.fd"

[limits]
# Cap on what all jobs together send, in bits per second: "20M", "1G". No cap without it. Or one that
# follows the clock, the first window that fits decides:
#   "08:00-20:00=20M, else=200M", "mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M"
# `longhaul limit` changes it while the agent runs.
# rate = "100M"
# Whose clock that is; the host's own without it.
# time_zone = "Europe/Paris"
# Memory for staging pages and chunks, over all jobs.
# memory = "1G"
# Downtime that a migration may take unless its command says otherwise.
# downtime_limit_ms = 300
# How long a job waits for a link that is down, in seconds, before the hand-over; the guest runs on
# meanwhile. The lower value of the two hosts counts. 0: a job ends with its link.
# link_patience_s = 300

[hooks]
# Programs around the switchover. Each gets a JSON document on its standard input, and
# LONGHAUL_VM, LONGHAUL_PEER, LONGHAUL_ROLE (source or target) and LONGHAUL_HOOK in its environment.
# If the one before fails, the migration is aborted and the guest runs on.
# before_switchover = "/etc/longhaul/before-switchover"
# after_switchover = "/etc/longhaul/after-switchover"
# Before `longhaul resolve` runs a guest here that the peer may be running: switches that host off.
# fence = "/etc/longhaul/fence"
# timeout_s = 10

[metrics]
# TCP address at which Prometheus finds this agent's numbers (http://ADDRESS/metrics), without
# encryption and to anybody who reaches it. Nowhere without it; `longhaul metrics` prints them, too.
# listen = "127.0.0.1:9464"

[scheduler]
# The peer that may see the load of this host and order moves of its VMs. Nobody without it.
# obeys = "paris"
# Peers that this agent plans for, besides itself; each must obey it. It plans for nobody without it.
# hosts = ["lyon", "nice"]
# Make the moves against hot hosts; otherwise they are only shown by `longhaul plan`.
# act = false
# Seconds between two looks at all hosts, each with a plan.
# interval_s = 300
# A host is hot from here on, and relieved until here: percent of its CPU.
# hot_percent = 80
# cool_percent = 75
# Moves that may start within an hour, and how long a VM rests that has moved.
# moves_per_hour = 10
# cooldown_s = 3600
# What a link is thought to carry that has carried nothing yet, in bits per second.
# link = "100M"
# Cores that VMs may use here, if others use the rest of this machine; then only what VMs use counts.
# cores = 8
# Hosts by site, for `longhaul evacuate`; this host is under its own name.
# sites = {{ north = ["paris", "lyon"], south = ["nice"] }}
# What cannot be seen of a VM: what saving it is worth, and where it may be.
# vms = {{ db1 = {{ weight = 8, apart = "db" }}, gateway = {{ pinned = true }} }}
"#,
        name = quoted(&name),
        listen = quoted(&listen),
        state_dir = path(state_dir),
        run_dir = path(run_dir),
        images = path(images),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const LISTEN: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4000);

    #[test]
    fn a_host_is_set_up_once() {
        let dir = tempfile::tempdir().unwrap();
        let prepared = init(Some(dir.path()), None, Some("paris"), LISTEN).unwrap();
        let config = Config::load(&prepared.file, &Overrides::default()).unwrap();
        assert_eq!(config, prepared.config);
        assert_eq!(config.listen, LISTEN);
        assert!(config.host.pools["default"].is_dir());
        let mode = std::fs::metadata(&config.state_dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let steps = next_steps(&prepared);
        assert!(steps.contains(&format!("LONGHAUL_CONFIG={}", prepared.file.display())), "{steps}");

        let before = std::fs::read(&prepared.file).unwrap();
        let again = init(Some(dir.path()), None, Some("lyon"), LISTEN);
        assert!(matches!(again, Err(SetupError::Exists(_))));
        assert_eq!(std::fs::read(&prepared.file).unwrap(), before);
    }

    #[test]
    fn a_bad_name_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let error = init(Some(dir.path()), None, Some("a b"), LISTEN).unwrap_err();
        assert!(error.to_string().starts_with("--name: `a b` is not a name"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn commented_defaults_are_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let prepared = init(Some(dir.path()), None, Some("paris"), LISTEN).unwrap();
        let text = std::fs::read_to_string(&prepared.file).unwrap();
        let default = |line: &str| {
            let skip = [
                "rate",
                "time_zone",
                "lan ",
                "routed ",
                "ovmf ",
                "before_",
                "after_",
                "fence",
                "listen",
                "serves",
                "obeys",
                "hosts",
                "cores",
                "sites",
                "vms =",
            ];
            line.contains(" = ") && !skip.iter().any(|name| line.starts_with(name))
        };
        let open = |line: &str| match line.strip_prefix("# ") {
            Some(setting) if default(setting) => setting.to_owned(),
            _ => line.to_owned(),
        };
        let opened: Vec<String> = text.lines().map(open).collect();
        assert!(opened.iter().any(|line| line == "downtime_limit_ms = 300"));
        let opened = Config::parse(&prepared.file, &opened.join("\n"), &Overrides::default());
        assert_eq!(opened.unwrap(), prepared.config);
    }
}
