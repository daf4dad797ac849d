//! The caps of this agent and its jobs: as they were set, and as the clock has them now.
//!
//! Invariant: what holds is what the calendars say of this moment: a change by a command holds when it
//! is answered, one by the clock within [`LOOK`] even if somebody sets the clock. A job's caps end with
//! it; what a command has set for the agent ends with the agent, and the configuration holds again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use longhaul_transport::{BitRate, Class, JobRate, RateLimiter};
use tokio::sync::Notify;

use crate::calendar::{Held, RateCalendar};
use crate::config;
use crate::control::{Failure, JobLimits, Limit, LimitChange, LimitRequest, Limits};

/// The calendars are looked at this often at least, because clocks are set.
const LOOK: Duration = Duration::from_secs(60);

/// All caps of this agent.
#[derive(Debug)]
pub struct Caps {
    limiter: RateLimiter,
    zone: TimeZone,
    configured: RateCalendar,
    table: Mutex<Table>,
    changed: Notify,
}

#[derive(Debug)]
struct Table {
    agent: Setting,
    /// By the VM that the job moves.
    jobs: BTreeMap<String, JobSettings>,
}

#[derive(Debug)]
struct JobSettings {
    rate: JobRate,
    all: Setting,
    /// Index with [`Class::index`].
    classes: [Setting; Class::ALL.len()],
}

/// One cap, and what of it the transport knows.
#[derive(Debug)]
struct Setting {
    calendar: RateCalendar,
    /// Without a cap the transport has none to begin with.
    holds: Option<BitRate>,
}

impl Setting {
    fn new(calendar: RateCalendar) -> Self {
        Self { calendar, holds: None }
    }

    /// Tells the transport what holds now if that is new; when something else does, if ever.
    fn follow(
        &mut self,
        now: Timestamp,
        zone: &TimeZone,
        tell: impl FnOnce(Option<BitRate>),
    ) -> Option<Timestamp> {
        let Held { rate, next } = self.calendar.at(now, zone);
        if rate != self.holds {
            self.holds = rate;
            tell(rate);
        }
        next.map(|(at, _)| at)
    }

    fn limit(&self, now: Timestamp, zone: &TimeZone) -> Limit {
        let Held { rate, next } = self.calendar.at(now, zone);
        let next = next.map(|(at, rate)| LimitChange {
            at,
            clock: at.to_zoned(zone.clone()).strftime("%a %H:%M").to_string(),
            rate,
        });
        Limit { set: self.calendar.clone(), now: rate, next }
    }

    fn is_none(&self) -> bool {
        self.calendar == RateCalendar::always(None)
    }
}

impl Table {
    /// Brings the transport up to this moment; the next one at which something changes.
    fn follow(
        &mut self,
        limiter: &RateLimiter,
        now: Timestamp,
        zone: &TimeZone,
    ) -> Option<Timestamp> {
        let mut next = vec![self.agent.follow(now, zone, |rate| limiter.set_agent(rate))];
        for job in self.jobs.values_mut() {
            let JobSettings { rate: job_rate, all, classes } = job;
            next.push(all.follow(now, zone, |rate| job_rate.set_job(rate)));
            for (class, setting) in Class::ALL.into_iter().zip(classes) {
                next.push(setting.follow(now, zone, |rate| job_rate.set_class(class, rate)));
            }
        }
        next.into_iter().flatten().min()
    }
}

impl Caps {
    /// The caps as the configuration has them, in force.
    pub fn new(limits: &config::Limits) -> Arc<Self> {
        let caps = Self {
            limiter: RateLimiter::new(),
            zone: limits.time_zone.clone(),
            configured: limits.rate.clone(),
            table: Mutex::new(Table {
                agent: Setting::new(limits.rate.clone()),
                jobs: BTreeMap::new(),
            }),
            changed: Notify::new(),
        };
        caps.apply(Timestamp::now());
        Arc::new(caps)
    }

    /// Follows the clock for as long as it is polled.
    pub(super) async fn follow_the_clock(&self) {
        loop {
            // Registered before the calendars are looked at, so that no change falls in between.
            let changed = self.changed.notified();
            let now = Timestamp::now();
            let next = self.apply(now);
            let wait = next.and_then(|next| Duration::try_from(next.duration_since(now)).ok());
            let wait = wait.map_or(LOOK, |wait| wait.min(LOOK));
            let _ = tokio::time::timeout(wait, changed).await;
        }
    }

    /// What sends under the agent's cap alone.
    pub(super) fn agent_alone(&self) -> JobRate {
        self.limiter.job()
    }

    /// The caps of the job that moves `vm`, from now until it ends.
    pub(super) fn begin_job(self: &Arc<Self>, vm: &str, calendar: Option<RateCalendar>) -> JobCaps {
        let rate = self.limiter.job();
        let none = || RateCalendar::always(None);
        let settings = JobSettings {
            rate: rate.clone(),
            all: Setting::new(calendar.unwrap_or_else(none)),
            classes: std::array::from_fn(|_| Setting::new(none())),
        };
        self.table().jobs.insert(vm.to_owned(), settings);
        self.apply(Timestamp::now());
        self.changed.notify_waiters();
        JobCaps { caps: Arc::clone(self), vm: vm.to_owned(), rate }
    }

    /// Changes what is asked for, if anything; then what holds.
    pub(super) fn change(&self, wish: LimitRequest) -> Result<Limits, Failure> {
        let LimitRequest { vm, rate, classes } = wish;
        let classes = classes.into_iter().map(|(name, calendar)| Ok((class(&name)?, calendar)));
        let classes = classes.collect::<Result<Vec<_>, Failure>>()?;
        let mut table = self.table();
        match vm {
            Some(vm) => {
                let job = table.jobs.get_mut(&vm).ok_or_else(|| no_job(&vm))?;
                for (class, calendar) in classes {
                    tracing::info!(vm, %class, cap = %calendar, "a cap of a job is changed");
                    job.classes[class.index()].calendar = calendar;
                }
                if let Some(calendar) = rate {
                    tracing::info!(vm, cap = %calendar, "the cap of a job is changed");
                    job.all.calendar = calendar;
                }
            }
            None if !classes.is_empty() => {
                let what = "classes are capped job by job, and no VM is named";
                return Err(Failure::refused(what, "`longhaul limit VM --class seed=20M`"));
            }
            None => {
                if let Some(calendar) = rate {
                    tracing::info!(cap = %calendar, "the agent's cap is changed");
                    table.agent.calendar = calendar;
                }
            }
        }
        drop(table);
        let now = Timestamp::now();
        self.apply(now);
        self.changed.notify_waiters();
        Ok(self.limits(now))
    }

    /// The caps of the job that moves `vm`, if it has any.
    pub(super) fn of_job(&self, vm: &str) -> Option<JobLimits> {
        let table = self.table();
        let (vm, job) = table.jobs.get_key_value(vm)?;
        let is_free = job.all.is_none() && job.classes.iter().all(Setting::is_none);
        (!is_free).then(|| self.job_limits(vm, job, Timestamp::now()))
    }

    /// What holds then, and what comes next.
    pub(super) fn limits(&self, now: Timestamp) -> Limits {
        let table = self.table();
        let zone = self.zone.iana_name().unwrap_or("this host").to_owned();
        let is_changed = table.agent.calendar != self.configured;
        Limits {
            time_zone: zone,
            agent: table.agent.limit(now, &self.zone),
            configured: is_changed.then(|| self.configured.clone()),
            jobs: table.jobs.iter().map(|(vm, job)| self.job_limits(vm, job, now)).collect(),
        }
    }

    fn job_limits(&self, vm: &str, job: &JobSettings, now: Timestamp) -> JobLimits {
        let capped = Class::ALL.into_iter().zip(&job.classes).filter(|(_, set)| !set.is_none());
        let limit =
            |(class, set): (Class, &Setting)| (class.name().to_owned(), set.limit(now, &self.zone));
        JobLimits {
            vm: vm.to_owned(),
            rate: job.all.limit(now, &self.zone),
            classes: capped.map(limit).collect(),
        }
    }

    fn apply(&self, now: Timestamp) -> Option<Timestamp> {
        self.table().follow(&self.limiter, now, &self.zone)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The caps of a job that runs.
#[derive(Debug)]
pub(super) struct JobCaps {
    caps: Arc<Caps>,
    vm: String,
    rate: JobRate,
}

impl JobCaps {
    /// What its sessions send under.
    pub(super) fn rate(&self) -> JobRate {
        self.rate.clone()
    }
}

impl Drop for JobCaps {
    fn drop(&mut self) {
        self.caps.table().jobs.remove(&self.vm);
    }
}

fn class(name: &str) -> Result<Class, Failure> {
    let capped = || Class::ALL.into_iter().filter(|class| *class != Class::HandOver);
    capped().find(|class| class.name() == name).ok_or_else(|| {
        let what = format!("`{name}` is no class that can be capped");
        let names: Vec<&str> = capped().map(Class::name).collect();
        Failure::refused(what, format!("classes are {}", names.join(", ")))
    })
}

fn no_job(vm: &str) -> Failure {
    let next = "`longhaul status` shows what runs; a job to come gets its cap by `--rate`";
    Failure::refused(format!("no job moves {vm}"), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(rate: &str) -> Arc<Caps> {
        let text = format!(
            "[agent]\nname = \"paris\"\n[limits]\nrate = \"{rate}\"\ntime_zone = \"UTC\"\n"
        );
        let overrides = config::Overrides::default();
        Caps::new(&config::Config::parse("f".as_ref(), &text, &overrides).unwrap().limits)
    }

    fn wish(vm: Option<&str>, rate: &str, classes: &[(&str, &str)]) -> LimitRequest {
        LimitRequest {
            vm: vm.map(str::to_owned),
            rate: rate.parse().ok(),
            classes: classes.iter().map(|(n, r)| ((*n).to_owned(), r.parse().unwrap())).collect(),
        }
    }

    #[test]
    fn the_clock_decides_what_holds() {
        let caps = caps("08:00-20:00=20M, else=200M");
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let job = caps.begin_job("db1", "12:00-13:00=1M, else=unlimited".parse().ok());
        assert_eq!(caps.apply(at("2026-08-03T07:00:00Z")), Some(at("2026-08-03T08:00:00Z")));
        assert_eq!(caps.table().agent.holds, "200M".parse().ok());
        assert_eq!(caps.apply(at("2026-08-03T08:00:00Z")), Some(at("2026-08-03T12:00:00Z")));
        assert_eq!(caps.table().agent.holds, "20M".parse().ok());
        assert_eq!(caps.table().jobs["db1"].all.holds, None);
        caps.apply(at("2026-08-03T12:59:59Z"));
        assert_eq!(caps.table().jobs["db1"].all.holds, "1M".parse().ok());
        let limits = caps.limits(at("2026-08-03T12:30:00Z"));
        assert_eq!(limits.time_zone, "UTC");
        assert_eq!(limits.agent.next.unwrap().clock, "Mon 20:00");
        assert_eq!(limits.jobs[0].rate.next.as_ref().unwrap().rate, None);
        drop(job);
        assert!(caps.limits(at("2026-08-03T12:30:00Z")).jobs.is_empty());
    }

    #[test]
    fn commands_change_what_they_name_and_nothing_else() {
        let caps = caps("100M");
        let _job = caps.begin_job("db1", None);
        assert_eq!(caps.of_job("db1"), None);
        let limits = caps.change(wish(None, "", &[])).unwrap();
        assert_eq!((limits.agent.now, limits.configured), ("100M".parse().ok(), None));
        let limits = caps.change(wish(None, "50M", &[])).unwrap();
        assert_eq!(limits.agent.now, "50M".parse().ok());
        assert_eq!(limits.configured.unwrap().to_string(), "100M");
        let limits = caps.change(wish(Some("db1"), "", &[("seed", "5M")])).unwrap();
        assert_eq!(limits.jobs[0].rate.now, None);
        assert_eq!(limits.jobs[0].classes["seed"].now, "5M".parse().ok());
        assert_eq!(caps.table().jobs["db1"].classes[Class::Seed.index()].holds, "5M".parse().ok());
        caps.change(wish(Some("db1"), "20M", &[("seed", "unlimited")])).unwrap();
        let limits = caps.of_job("db1").unwrap();
        assert_eq!((limits.rate.now, limits.classes.len()), ("20M".parse().ok(), 0));
    }

    #[test]
    fn what_cannot_be_capped_is_refused_and_nothing_changes() {
        let caps = caps("100M");
        let _job = caps.begin_job("db1", None);
        for (wish, expected) in [
            (wish(Some("db2"), "1M", &[]), "no job moves db2"),
            (wish(Some("db1"), "1M", &[("speed", "1M")]), "`speed` is no class"),
            (wish(Some("db1"), "1M", &[("hand-over", "1M")]), "`hand-over` is no class"),
            (wish(None, "1M", &[("seed", "1M")]), "no VM is named"),
        ] {
            let failure = caps.change(wish).unwrap_err();
            assert!(failure.what.contains(expected), "{failure:?}");
            assert!(!failure.next.is_empty());
        }
        assert_eq!(caps.of_job("db1"), None);
        assert_eq!(caps.limits(Timestamp::now()).configured, None);
    }
}
