//! The sections of `agent.toml` as they are typed, and what each of them means.
//!
//! Invariant: nothing of these types leaves `config`; unknown fields are refused in every section.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde::Deserialize;
use toml::Spanned;

use super::scheduler::SchedulerTyped;
use super::{
    ConfigError, HookConfig, Limits, Problem, Source, absolute, parse_listen, problem,
    valid_downtime_limit, valid_name,
};
use crate::calendar::RateCalendar;
use crate::hypervisor::spec::host::{AccelPreference, HostPolicy, NetworkBackend};
use crate::units::ByteCount;

/// Downtime that a migration may take when the job does not say.
const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// How long a job waits for a link that is down when the file does not say.
const DEFAULT_LINK_PATIENCE: Duration = Duration::from_secs(300);
/// Beyond a day, a job that waits is forgotten by those who began it.
const LINK_PATIENCE_MAX_S: u64 = 24 * 3600;
/// Memory for staging when the file does not say.
const DEFAULT_MEMORY: ByteCount = ByteCount(1 << 30);
/// Less than this cannot hold one batch of every class.
const MEMORY_MIN: ByteCount = ByteCount(64 << 20);
/// Time for one hook when the file does not say.
const DEFAULT_HOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// A hook holds up a switchover: longer than this is a mistake.
const HOOK_TIMEOUT_S_MAX: u64 = 300;
/// How an address for metrics is written.
const METRICS_EXAMPLE: &str = "127.0.0.1:9464";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Typed {
    pub(super) agent: AgentTyped,
    #[serde(default)]
    pub(super) qemu: QemuTyped,
    #[serde(default)]
    pub(super) pools: BTreeMap<String, Spanned<PathBuf>>,
    #[serde(default)]
    pub(super) networks: BTreeMap<String, Spanned<NetworkTyped>>,
    #[serde(default)]
    pub(super) firmware: BTreeMap<String, Spanned<PathBuf>>,
    #[serde(default)]
    pub(super) limits: LimitsTyped,
    #[serde(default)]
    pub(super) hooks: HooksTyped,
    #[serde(default)]
    pub(super) metrics: MetricsTyped,
    #[serde(default)]
    pub(super) scheduler: SchedulerTyped,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentTyped {
    pub(super) name: Spanned<String>,
    pub(super) listen: Option<Spanned<String>>,
    pub(super) state_dir: Option<Spanned<PathBuf>>,
    pub(super) run_dir: Option<Spanned<PathBuf>>,
    #[serde(default)]
    pub(super) serves: Vec<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct QemuTyped {
    pub(super) system: Option<PathBuf>,
    pub(super) img: Option<PathBuf>,
    pub(super) nbd: Option<PathBuf>,
    #[serde(default)]
    pub(super) accel: AccelPreference,
    pub(super) sandbox: Option<bool>,
    pub(super) vcpus_max: Option<Spanned<u32>>,
    pub(super) memory_max: Option<Spanned<String>>,
}

impl QemuTyped {
    /// The policy, as far as this section has it.
    pub(super) fn meaning(&self, source: &Source<'_>) -> Result<HostPolicy, ConfigError> {
        let default = HostPolicy::default();
        let vcpus = |vcpus: &u32| match *vcpus {
            0 => Err(problem("a VM without processors cannot be", "write at least 1")),
            vcpus => Ok(vcpus),
        };
        let memory = |text: &String| match text.parse::<ByteCount>() {
            Ok(ByteCount(bytes)) if bytes >= 1 << 20 => Ok(bytes >> 20),
            _ => Err(problem(format!("`{text}` is no size for a VM"), "write e.g. \"64G\"")),
        };
        Ok(HostPolicy {
            qemu: self.system.clone().unwrap_or_else(|| "qemu-system-x86_64".into()),
            accel: self.accel,
            sandbox: self.sandbox.unwrap_or(default.sandbox),
            vcpus_max: match &self.vcpus_max {
                Some(max) => source.checked(max, vcpus)?,
                None => default.vcpus_max,
            },
            memory_mib_max: match &self.memory_max {
                Some(max) => source.checked(max, memory)?,
                None => default.memory_mib_max,
            },
            ..default
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkTyped {
    bridge: Option<String>,
    helper: Option<PathBuf>,
    tap_script: Option<PathBuf>,
    tap_down_script: Option<PathBuf>,
    #[serde(default)]
    vhost: bool,
    #[serde(default)]
    user: bool,
    #[serde(default)]
    restrict: bool,
    #[serde(default)]
    none: bool,
}

impl NetworkTyped {
    pub(super) fn meaning(&self) -> Result<NetworkBackend, Problem> {
        let (has_bridge, has_tap) = (self.bridge.is_some(), self.tap_script.is_some());
        let kinds = [has_bridge, has_tap, self.user, self.none];
        let stray = [
            self.helper.is_some() && !has_bridge,
            (self.tap_down_script.is_some() || self.vhost) && !has_tap,
            self.restrict && !self.user,
        ];
        if kinds.into_iter().filter(|kind| *kind).count() != 1 || stray.contains(&true) {
            return Err(problem(
                "a network is exactly one thing",
                "write { bridge = \"br0\" }, { tap_script = \"/etc/longhaul/tap-up\" }, \
                 { user = true } or { none = true }",
            ));
        }
        let path = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
        if let Some(bridge) = &self.bridge {
            let (bridge, helper) = (interface(bridge)?, path(&self.helper)?);
            return Ok(NetworkBackend::Bridge { bridge, helper });
        }
        if let Some(script) = &self.tap_script {
            let (script, down_script) = (absolute(script)?, path(&self.tap_down_script)?);
            return Ok(NetworkBackend::Tap { script, down_script, vhost: self.vhost });
        }
        match self.user {
            true => Ok(NetworkBackend::User { restrict: self.restrict }),
            false => Ok(NetworkBackend::None),
        }
    }
}

/// Linux allows 15 bytes for the name of an interface (IFNAMSIZ is 16, with the closing zero).
fn interface(name: &str) -> Result<String, Problem> {
    valid_name(name)?;
    if name.len() > 15 {
        return Err(problem(
            format!("`{name}` is too long for an interface"),
            "`ip link` shows the interfaces that exist",
        ));
    }
    Ok(name.to_owned())
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsTyped {
    rate: Option<Spanned<String>>,
    time_zone: Option<Spanned<String>>,
    memory: Option<Spanned<String>>,
    downtime_limit_ms: Option<Spanned<u64>>,
    link_patience_s: Option<Spanned<u64>>,
}

impl LimitsTyped {
    pub(super) fn meaning(&self, source: &Source<'_>) -> Result<Limits, ConfigError> {
        let rate = |text: &String| {
            text.parse::<RateCalendar>().map_err(|error| {
                let what = format!("`{text}` is not a cap: {error}");
                let remedy = "write e.g. \"20M\" for 20 Mbit/s or \"08:00-20:00=20M, \
                              else=200M\", or remove the line for no cap";
                problem(what, remedy)
            })
        };
        let zone = |name: &String| {
            TimeZone::get(name).map_err(|_| {
                let what = format!("`{name}` is no time zone that this host knows");
                problem(what, "write e.g. \"Europe/Paris\", or remove the line for the host's own")
            })
        };
        let memory = |text: &String| match text.parse::<ByteCount>() {
            Ok(memory) if memory >= MEMORY_MIN => Ok(memory),
            Ok(_) => Err(problem(format!("{text} is too little"), "write at least \"64M\"")),
            Err(_) => {
                Err(problem(format!("`{text}` is not a size"), "write e.g. \"512M\" or \"4G\""))
            }
        };
        let downtime = |ms: &u64| valid_downtime_limit(*ms).map(Duration::from_millis);
        let patience = |seconds: &u64| match *seconds {
            0..=LINK_PATIENCE_MAX_S => Ok(Duration::from_secs(*seconds)),
            _ => {
                let use_less = format!("use at most {LINK_PATIENCE_MAX_S}, which is a day");
                Err(problem(format!("{seconds} s are too long to wait for a link"), use_less))
            }
        };
        Ok(Limits {
            rate: match &self.rate {
                Some(text) => source.checked(text, rate)?,
                None => RateCalendar::always(None),
            },
            time_zone: match &self.time_zone {
                Some(name) => source.checked(name, zone)?,
                None => TimeZone::system(),
            },
            memory: match &self.memory {
                Some(text) => source.checked(text, memory)?,
                None => DEFAULT_MEMORY,
            },
            downtime: match &self.downtime_limit_ms {
                Some(ms) => source.checked(ms, downtime)?,
                None => DEFAULT_DOWNTIME_LIMIT,
            },
            link_patience: match &self.link_patience_s {
                Some(seconds) => source.checked(seconds, patience)?,
                None => DEFAULT_LINK_PATIENCE,
            },
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct HooksTyped {
    before_switchover: Option<Spanned<PathBuf>>,
    after_switchover: Option<Spanned<PathBuf>>,
    fence: Option<Spanned<PathBuf>>,
    timeout_s: Option<Spanned<u64>>,
}

impl HooksTyped {
    pub(super) fn meaning(&self, source: &Source<'_>) -> Result<HookConfig, ConfigError> {
        let program = |program: &Option<Spanned<PathBuf>>| {
            program.as_ref().map(|path| source.checked(path, |path| absolute(path))).transpose()
        };
        let timeout = |s: &u64| match *s {
            s @ 1..=HOOK_TIMEOUT_S_MAX => Ok(Duration::from_secs(s)),
            s => Err(problem(
                format!("{s} seconds are no time for a hook"),
                format!("write 1 to {HOOK_TIMEOUT_S_MAX}"),
            )),
        };
        Ok(HookConfig {
            before_switchover: program(&self.before_switchover)?,
            after_switchover: program(&self.after_switchover)?,
            fence: program(&self.fence)?,
            timeout: match &self.timeout_s {
                Some(s) => source.checked(s, timeout)?,
                None => DEFAULT_HOOK_TIMEOUT,
            },
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsTyped {
    listen: Option<Spanned<String>>,
}

impl MetricsTyped {
    pub(super) fn meaning(&self, source: &Source<'_>) -> Result<Option<SocketAddr>, ConfigError> {
        let address = |text: &String| parse_listen(text, METRICS_EXAMPLE);
        self.listen.as_ref().map(|listen| source.checked(listen, address)).transpose()
    }
}
