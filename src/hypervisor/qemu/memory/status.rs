//! What QEMU says of a migration and of itself, typed, and how to wait until it says something else.
//!
//! Invariant: waiting is free of races, because the state is asked for after events were subscribed
//! to, and again after each event and each [`POLL`]: an event only makes the next question come
//! sooner, none is ever relied on.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::hypervisor::HypervisorError;
use crate::hypervisor::qemu::qmp::{Qmp, QmpEvent};

/// How often a state is asked for while no event comes.
const POLL: Duration = Duration::from_millis(50);

/// `query-migrate`'s answer, as far as it matters to us.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(super) struct Migration {
    pub(super) status: Phase,
    pub(super) ram: Ram,
    pub(super) error_desc: Option<String>,
}

/// QEMU's `MigrationStatus`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Phase {
    /// None was ever begun; QEMU then leaves the status out.
    #[default]
    None,
    Setup,
    Active,
    PreSwitchover,
    Device,
    Cancelling,
    Cancelled,
    Failed,
    Completed,
    /// One that our settings exclude, or that is newer than this code.
    #[serde(other)]
    Other,
}

/// Counters of memory.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(super) struct Ram {
    pub(super) remaining: u64,
    pub(super) dirty_pages_rate: u64,
    pub(super) dirty_sync_count: u64,
}

/// `query-status`'s answer. `status` stays a string: only a few of its values matter to us.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    pub(super) running: bool,
    pub(super) status: String,
}

/// `query-kvm`'s answer.
#[derive(Debug, Deserialize)]
pub(super) struct Kvm {
    pub(super) enabled: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Parameters {
    downtime_limit: u64,
}

#[derive(Debug, Deserialize)]
struct Capability {
    capability: String,
}

/// One wait with its limit.
pub(super) struct Wait<'a> {
    qmp: &'a Qmp,
    events: Receiver<QmpEvent>,
    what: &'static str,
    limit: Duration,
    deadline: Instant,
}

impl<'a> Wait<'a> {
    /// Begins to wait for `what` (for messages): subscribes to events, so ask for the state next.
    pub(super) fn begin(qmp: &'a Qmp, what: &'static str, limit: Duration) -> Self {
        Self { qmp, events: qmp.events(), what, limit, deadline: Instant::now() + limit }
    }

    /// Returns when it is worth asking again.
    ///
    /// # Errors
    ///
    /// `Gone` once the limit is over.
    pub(super) async fn again(&mut self) -> Result<(), HypervisorError> {
        let now = Instant::now();
        if now >= self.deadline {
            return Err(HypervisorError::Gone {
                vm: self.qmp.vm().to_owned(),
                detail: format!("waited {} s for {}", self.limit.as_secs(), self.what),
            });
        }
        let until = self.deadline.min(now + POLL);
        loop {
            match timeout_at(until, self.events.recv()).await {
                Ok(Ok(event)) if ["MIGRATION", "STOP", "RESUME"].contains(&event.name.as_str()) => {
                    return Ok(());
                }
                Ok(Ok(_)) => {}
                Ok(Err(RecvError::Lagged(_))) | Err(_) => return Ok(()),
                // The next question says why it is closed.
                Ok(Err(RecvError::Closed)) => {
                    sleep_until(until).await;
                    return Ok(());
                }
            }
        }
    }

    /// Asks how the migration is. QEMU may hold its main lock for as long as its disks or we keep it
    /// waiting, so the question has as long as the whole wait.
    pub(super) async fn migration(&self) -> Result<Migration, HypervisorError> {
        self.ask("query-migrate").await
    }

    /// Asks whether the CPUs run.
    pub(super) async fn status(&self) -> Result<Status, HypervisorError> {
        self.ask("query-status").await
    }

    async fn ask<T: DeserializeOwned>(&self, command: &str) -> Result<T, HypervisorError> {
        let left = self.deadline.saturating_duration_since(Instant::now()).max(POLL);
        let answer = self.qmp.execute_within(command, json!({}), left).await?;
        typed(self.qmp, command, answer)
    }
}

/// Reads an answer of QEMU's.
pub(super) fn typed<T: DeserializeOwned>(
    qmp: &Qmp,
    command: &str,
    answer: Value,
) -> Result<T, HypervisorError> {
    serde_json::from_value(answer).map_err(|error| HypervisorError::Unexpected {
        vm: qmp.vm().to_owned(),
        detail: format!("{command}: {error}"),
    })
}

/// Switches every migration capability that this QEMU has off, but for those in `on`: an earlier
/// attempt, ours or another's, may have left any of them in any state.
pub(super) async fn set_capabilities(qmp: &Qmp, on: &[&str]) -> Result<(), HypervisorError> {
    let command = "query-migrate-capabilities";
    let known: Vec<Capability> = typed(qmp, command, qmp.execute(command, json!({})).await?)?;
    if let Some(missing) = on.iter().find(|name| known.iter().all(|c| c.capability != **name)) {
        return Err(HypervisorError::Unsupported {
            vm: qmp.vm().to_owned(),
            reason: format!(
                "its QEMU has no migration capability {missing}: QEMU 7.2 or newer is needed"
            ),
        });
    }
    let capabilities: Vec<Value> = known
        .iter()
        .map(|Capability { capability }| {
            json!({"capability": capability, "state": on.contains(&capability.as_str())})
        })
        .collect();
    qmp.execute("migrate-set-capabilities", json!({"capabilities": capabilities})).await?;
    Ok(())
}

/// QEMU's downtime limit, in milliseconds.
pub(super) async fn downtime_limit(qmp: &Qmp) -> Result<u64, HypervisorError> {
    let command = "query-migrate-parameters";
    let parameters: Parameters = typed(qmp, command, qmp.execute(command, json!({})).await?)?;
    Ok(parameters.downtime_limit)
}

/// Sets migration parameters.
pub(super) async fn set_parameters(
    qmp: &Qmp,
    parameters: &[(&str, Value)],
) -> Result<(), HypervisorError> {
    let parameters: Map<String, Value> =
        parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    qmp.execute("migrate-set-parameters", Value::Object(parameters)).await?;
    Ok(())
}

/// An error for a migration that is where it should not be, with QEMU's words if it has any.
pub(super) fn unexpected(qmp: &Qmp, migration: &Migration, wanted: &str) -> HypervisorError {
    let words = migration.error_desc.as_deref().map(|words| format!(": {words}"));
    HypervisorError::Unexpected {
        vm: qmp.vm().to_owned(),
        detail: format!(
            "its migration is {:?} instead of {wanted}{}",
            migration.status,
            words.unwrap_or_default()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_old_and_new_qemus_are_read() {
        let none: Migration = serde_json::from_str("{}").unwrap();
        assert_eq!(none.status, Phase::None);
        let active = r#"{"status": "active", "expected-downtime": 300, "ram": {"remaining": 7,
            "dirty-pages-rate": 8, "dirty-sync-count": 9, "page-size": 4096}}"#;
        let active: Migration = serde_json::from_str(active).unwrap();
        assert_eq!((active.status, active.ram.remaining), (Phase::Active, 7));
        assert_eq!((active.ram.dirty_pages_rate, active.ram.dirty_sync_count), (8, 9));
        let failed = r#"{"status": "failed", "error-desc": "no"}"#;
        let failed: Migration = serde_json::from_str(failed).unwrap();
        assert_eq!((failed.status, failed.error_desc.as_deref()), (Phase::Failed, Some("no")));
        let newer: Migration = serde_json::from_str(r#"{"status": "postcopy-device"}"#).unwrap();
        assert_eq!(newer.status, Phase::Other);
        let waiting: Migration = serde_json::from_str(r#"{"status": "pre-switchover"}"#).unwrap();
        assert_eq!(waiting.status, Phase::PreSwitchover);
    }
}
