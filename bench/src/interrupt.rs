//! Ctrl-C and SIGTERM during a measurement.
//!
//! Invariant: a signal ends whatever waits here with an error, so that every guard is dropped and
//! nothing stays; it never ends the process by itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

static CAME: AtomicBool = AtomicBool::new(false);

/// How often a wait looks for a signal.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// From now on SIGINT and SIGTERM are noticed here instead of ending the process. `take_down` runs
/// when one comes: it ends what a wait elsewhere depends on.
///
/// # Errors
///
/// When the handlers cannot be installed.
pub fn notice(take_down: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("while preparing for signals")?;
    let (mut interrupt, mut terminate) = {
        let _guard = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        CAME.store(true, Ordering::SeqCst);
        take_down();
    });
    Ok(())
}

/// Fails once a signal came.
///
/// # Errors
///
/// A signal came.
pub fn check() -> Result<()> {
    ensure!(!CAME.load(Ordering::SeqCst), "interrupted");
    Ok(())
}

/// `result`, unless it is a failure after a signal: what failed because everything was taken down is
/// not what went wrong.
///
/// # Errors
///
/// The result's, or that a signal came.
pub fn or_came<T>(result: Result<T>) -> Result<T> {
    result.or_else(|error| check().and(Err(error)))
}

/// Sleeps, but not through a signal.
///
/// # Errors
///
/// A signal came.
pub fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK_PERIOD));
    }
}
