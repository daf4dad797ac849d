//! Named points of the switchover, at which tests stop an agent to break something just there.
//!
//! Invariant: without the feature `points` this is nothing; no release has it. With it, an agent
//! whose environment names a folder in `LONGHAUL_POINTS` stops at a point for as long as the folder
//! has a file of that name, and says so with a file `NAME.reached`.

/// Before the guest is paused.
pub(super) const PAUSING: &str = "source.pausing";
/// The guest is paused.
pub(super) const PAUSED: &str = "source.paused";
/// The hypervisor is parked; nothing is journaled.
pub(super) const PARKED: &str = "source.parked";
/// The delegation is durable; no token was sent.
pub(super) const DELEGATED: &str = "source.delegated";
/// The token is with the transport.
pub(super) const TOKEN_SENT: &str = "source.token-sent";
/// The target's answer is here, and nothing followed from it.
pub(super) const ANSWERED: &str = "source.answered";
/// The answer is noted; the parked hypervisor is still there.
pub(super) const NOTED: &str = "source.noted";
/// The parked hypervisor is gone; the target has not heard that we know.
pub(super) const LET_GO: &str = "source.let-go";
/// The token is here.
pub(super) const TOKEN: &str = "target.token";
/// Everything is here and loaded; nothing is journaled.
pub(super) const LOADED: &str = "target.loaded";
/// The acceptance is durable; the guest does not run.
pub(super) const ACCEPTED: &str = "target.accepted";
/// The guest runs; the source has not heard of it.
pub(super) const RUNS: &str = "target.runs";
/// The source was told; the VM is not in the book.
pub(super) const TOLD: &str = "target.told";
/// The VM is in the book; that is not noted.
pub(super) const BOOKED: &str = "target.booked";

/// Stops here if a test wants it.
#[cfg(not(feature = "points"))]
pub(super) async fn reach(_point: &str) {}

/// Stops here if a test wants it.
#[cfg(feature = "points")]
pub(super) async fn reach(point: &str) {
    use std::path::PathBuf;
    use std::time::Duration;

    const LOOK_PERIOD: Duration = Duration::from_millis(2);

    let Some(folder) = std::env::var_os("LONGHAUL_POINTS").map(PathBuf::from) else { return };
    let armed = folder.join(point);
    if !armed.exists() {
        return;
    }
    tracing::info!(point, "stopped at a point");
    if let Err(error) = std::fs::write(folder.join(format!("{point}.reached")), "") {
        tracing::error!(point, %error, "a test cannot be told");
    }
    while armed.exists() {
        tokio::time::sleep(LOOK_PERIOD).await;
    }
    tracing::info!(point, "goes on");
}
