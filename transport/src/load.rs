//! Whether a thread is what limits: it has no time to spare, and a core to itself.
//!
//! Invariant: a thread that waits for a core is never taken for one that needs a second one: another
//! thread would only wait beside it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that must find it full.
const LOOKS: u32 = 3;
/// Share of the time that it is busy when full; and that it may have waited for a core.
const BUSY: f64 = 0.9;
const WAITED: f64 = 0.1;

/// How busy a thread is.
#[derive(Debug, Default)]
pub(crate) struct Load(AtomicBool);

impl Load {
    pub(crate) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Watches the thread that polls this, which runs a runtime of its own.
    pub(crate) async fn watch(self: Arc<Self>) {
        let Some(waits) = Waits::of_this_thread() else { return };
        let metrics = Handle::current().metrics();
        let look = || (Instant::now(), metrics.worker_total_busy_duration(0), waits.so_far());
        let (mut last, mut streak) = (look(), Streak::default());
        loop {
            sleep(LOOK).await;
            let now = look();
            let elapsed = (now.0 - last.0).as_secs_f64();
            let share =
                |to: Duration, from: Duration| to.saturating_sub(from).as_secs_f64() / elapsed;
            self.0.store(streak.see(share(now.1, last.1), share(now.2, last.2)), Ordering::Relaxed);
            last = now;
        }
    }
}

/// Looks in a row that have found it full.
#[derive(Debug, Default)]
struct Streak(u32);

impl Streak {
    /// Takes in for which shares of the time it was busy and has waited; whether it is full.
    fn see(&mut self, busy: f64, waited: f64) -> bool {
        let is_full = busy >= BUSY && waited <= WAITED;
        self.0 = if is_full { self.0.saturating_add(1) } else { 0 };
        self.0 >= LOOKS
    }
}

/// How long a thread has waited for a core (`/proc/PID/task/TID/schedstat`, its second number; kernel
/// documentation, scheduler/sched-stats).
struct Waits(PathBuf);

impl Waits {
    /// `None` where the kernel does not count that.
    fn of_this_thread() -> Option<Self> {
        let thread = fs::read_link("/proc/thread-self").ok()?;
        let waits = Self(PathBuf::from("/proc").join(thread).join("schedstat"));
        waits.read().map(|_| waits)
    }

    fn so_far(&self) -> Duration {
        self.read().unwrap_or_default()
    }

    fn read(&self) -> Option<Duration> {
        let text = fs::read_to_string(&self.0).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_is_who_is_busy_for_long_and_has_a_core() {
        let mut streak = Streak::default();
        assert_eq!([1.0, 0.95, 0.9].map(|busy| streak.see(busy, 0.05)), [false, false, true]);
        assert!(!streak.see(0.8, 0.0), "it had time");
        assert_eq!([1.0; 4].map(|busy| streak.see(busy, 0.2)), [false; 4]);
    }

    #[test]
    fn the_kernel_says_how_long_a_thread_has_waited() {
        let waits = Waits::of_this_thread().unwrap();
        assert!(waits.read().is_some());
    }
}
