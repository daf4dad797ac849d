//! When to switch over: a pure function of measurements.
//!
//! Invariant: the same measurements give the same decision; the hypervisor's own estimate, made on a
//! local socket, has no say. The model is DESIGN's: downtime = residue / rate + round trip / 2 +
//! what the two hypervisors need for themselves.

use std::collections::VecDeque;

/// What the hypervisors need beside the residue: parking, loading devices, starting. Measured with
/// QEMU 7.2 and 10.0 on slow emulated guests; only a forecast, the report has what it really took.
const FIXED_MS: f64 = 60.0;
/// Without a lower forecast for this long, the lowest seen is taken for what can be had.
const STAGNATION_MS: u64 = 6_000;
/// A forecast this close to the lowest one seen counts as at the minimum.
const AT_MINIMUM: f64 = 1.15;
/// Forecasts that are remembered, at one a tick.
const HISTORY_MAX: usize = 256;

/// What the job allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Downtime that the job asks for.
    pub target_ms: f64,
    /// Downtime that it bears, if the target cannot be reached.
    pub max_ms: f64,
    /// When to give up, in milliseconds since the start of pre-copy.
    pub deadline_ms: u64,
}

/// What was measured now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Milliseconds since the start of pre-copy.
    pub at_ms: u64,
    /// Every page has been read from the hypervisor at least once.
    pub first_pass_done: bool,
    /// Page bytes that the hypervisor still holds.
    pub remaining_bytes: u64,
    /// Page bytes in the staging area.
    pub staged_bytes: u64,
    /// Wire bytes sent and not yet applied at the target.
    pub unapplied_wire_bytes: u64,
    /// Disk bytes written by the guest and not yet sent.
    pub disk_bytes: u64,
    /// Page bytes dirtied per second by the hypervisor's count, 0 if unknown.
    pub dirty_bytes_per_s: u64,
    /// Wire bytes for a byte of page, lately.
    pub wire_per_page_byte: f64,
    /// What the link carries, in bytes per second.
    pub link_bytes_per_s: f64,
    /// Smoothed round trip.
    pub rtt_ms: f64,
}

impl Measured {
    /// The downtime to expect if the guest were paused now.
    pub fn forecast_ms(&self) -> f64 {
        let pages = (self.remaining_bytes + self.staged_bytes) as f64 * self.wire_per_page_byte;
        let wire = pages + self.disk_bytes as f64 * 0.5 + self.unapplied_wire_bytes as f64;
        wire / self.link_bytes_per_s.max(1.0) * 1000.0 + self.rtt_ms / 2.0 + FIXED_MS
    }

    /// Page bytes that the link takes in `ms`.
    pub fn page_bytes_in(&self, ms: f64) -> u64 {
        (self.link_bytes_per_s * ms / 1000.0 / self.wire_per_page_byte.max(0.01)) as u64
    }

    /// Milliseconds for what is staged and sent already.
    pub fn under_way_ms(&self) -> f64 {
        let wire = self.staged_bytes as f64 * self.wire_per_page_byte;
        (wire + self.unapplied_wire_bytes as f64) / self.link_bytes_per_s.max(1.0) * 1000.0
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Pause the guest as soon as the hypervisor can.
    Switch {
        /// The forecast that led to it.
        forecast_ms: f64,
        /// Whether the job's target is met, or just what it bears.
        within_target: bool,
    },
    /// It does not converge within what the job allows.
    GiveUp {
        /// In a sentence.
        reason: String,
    },
}

/// The decision, with the memory of earlier measurements that it needs.
#[derive(Debug)]
pub struct Convergence {
    budget: Budget,
    history: VecDeque<(u64, f64)>,
    lowest: Option<(u64, f64)>,
}

impl Convergence {
    /// With nothing measured yet.
    pub fn new(budget: Budget) -> Self {
        Self { budget, history: VecDeque::new(), lowest: None }
    }

    /// Takes a measurement and decides.
    pub fn decide(&mut self, now: &Measured) -> Decision {
        if !now.first_pass_done {
            return self.unless_late(now, f64::INFINITY);
        }
        let forecast = now.forecast_ms();
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back((now.at_ms, forecast));
        if self.lowest.is_none_or(|(_, lowest)| forecast < lowest * 0.95) {
            self.lowest = Some((now.at_ms, forecast));
        }
        if forecast <= self.budget.target_ms {
            return Decision::Switch { forecast_ms: forecast, within_target: true };
        }
        // It does not get better: take a local minimum if the job bears it.
        if let Some((at, lowest)) = self.lowest
            && now.at_ms.saturating_sub(at) >= STAGNATION_MS
            && forecast <= lowest * AT_MINIMUM
            && forecast <= self.budget.max_ms
        {
            return Decision::Switch { forecast_ms: forecast, within_target: false };
        }
        self.unless_late(now, forecast)
    }

    fn unless_late(&self, now: &Measured, forecast: f64) -> Decision {
        if now.at_ms < self.budget.deadline_ms {
            return Decision::Continue;
        }
        let seconds = self.budget.deadline_ms / 1000;
        if !now.first_pass_done {
            let reason = format!("memory did not cross once within the deadline of {seconds} s");
            return Decision::GiveUp { reason };
        }
        if forecast <= self.budget.max_ms {
            return Decision::Switch { forecast_ms: forecast, within_target: false };
        }
        Decision::GiveUp {
            reason: format!(
                "after {seconds} s a switchover would still take {forecast:.0} ms, and the job \
                 bears {:.0} ms: the guest dirties about {} KiB/s and the link takes {} KiB/s",
                self.budget.max_ms,
                now.dirty_bytes_per_s / 1024,
                now.link_bytes_per_s as u64 / 1024,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { target_ms: 300.0, max_ms: 2_000.0, deadline_ms: 60_000 };

    fn measured(at_ms: u64, remaining_bytes: u64) -> Measured {
        Measured {
            at_ms,
            first_pass_done: true,
            remaining_bytes,
            staged_bytes: 0,
            unapplied_wire_bytes: 0,
            disk_bytes: 0,
            dirty_bytes_per_s: 0,
            wire_per_page_byte: 0.5,
            link_bytes_per_s: 25e6,
            rtt_ms: 80.0,
        }
    }

    #[test]
    fn what_is_under_way_is_counted_as_the_link_sees_it() {
        let sent = Measured { unapplied_wire_bytes: 1_000_000, ..measured(100, 0) };
        let both = Measured { staged_bytes: 2_000_000, ..sent };
        assert_eq!(sent.under_way_ms(), 40.0);
        assert_eq!(both.under_way_ms(), 80.0);
        assert_eq!(both.page_bytes_in(80.0), 4_000_000);
    }

    #[test]
    fn a_small_residue_switches_at_once() {
        let mut convergence = Convergence::new(BUDGET);
        let decision = convergence.decide(&measured(100, 1 << 20));
        assert!(matches!(decision, Decision::Switch { within_target: true, .. }), "{decision:?}");
    }

    #[test]
    fn nothing_switches_before_every_page_was_seen() {
        let mut convergence = Convergence::new(BUDGET);
        let now = Measured { first_pass_done: false, ..measured(100, 0) };
        assert_eq!(convergence.decide(&now), Decision::Continue);
    }

    #[test]
    fn a_guest_that_stays_busy_switches_at_a_local_minimum() {
        let mut convergence = Convergence::new(BUDGET);
        let mut switched = None;
        for tick in 0..600 {
            // Between 16 and 24 MiB remain, forever.
            let remaining = (16 << 20) + ((tick * 7) % 9) * (1 << 20);
            if let Decision::Switch { forecast_ms, within_target } =
                convergence.decide(&measured(tick * 100, remaining))
            {
                switched = Some((tick, forecast_ms, within_target));
                break;
            }
        }
        let (tick, forecast_ms, within_target) = switched.expect("it must not wait forever");
        assert!(!within_target);
        assert!(tick >= STAGNATION_MS / 100, "it waits for a better one first");
        assert!(forecast_ms < 600.0, "{forecast_ms}");
    }

    #[test]
    fn a_guest_that_never_fits_is_given_up_at_the_deadline_with_the_numbers() {
        let mut convergence = Convergence::new(BUDGET);
        assert_eq!(convergence.decide(&measured(59_999, 1 << 30)), Decision::Continue);
        let Decision::GiveUp { reason } = convergence.decide(&measured(60_000, 1 << 30)) else {
            panic!("it had to give up");
        };
        assert!(reason.contains("bears 2000 ms"), "{reason}");
    }
}
