//! How long one VM takes over one link whose rate and whose own changes vary by the slot.
//!
//! Invariant: of two transfers of one VM that begin whole, the one that begins earlier does not end
//! later; so a link never waits, and what does not fit from now on does not fit at all.
//!
//! Rates are constant within a slot ([`Stretch`]).

use crate::stretch::{Step, Stretch};

/// The slots, in seconds from the first one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// Length of a slot.
    pub(super) slot_s: f64,
    /// When the first transfer may begin.
    pub(super) now: f64,
    /// When the last one must have ended.
    pub(super) deadline: f64,
    /// Longest pause of a guest.
    pub(super) pause_s: f64,
}

/// One VM's data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load<'a> {
    /// All of it, in MiB.
    pub(super) whole: f64,
    /// What the target does not have.
    pub(super) left: f64,
    /// MiB a second that change: one for all slots, or one for each.
    pub(super) dirty: &'a [f64],
}

/// A transfer that ends in time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sent {
    /// When, in seconds from the first slot.
    pub(super) end: f64,
    /// MiB that crossed the link.
    pub(super) mib: f64,
}

/// The value of a slot; a single value is that of all slots.
pub(super) fn at(series: &[f64], slot: usize) -> f64 {
    let slot = if series.len() == 1 { 0 } else { slot };
    series.get(slot).copied().unwrap_or(0.0)
}

/// Sends one VM from `start` on, alone; nothing if it does not end by the deadline. `steps` counts
/// slots that were looked at, which is what the search has a budget of.
pub(super) fn send(
    clock: &Clock,
    link: &[f64],
    load: Load<'_>,
    start: f64,
    steps: &mut u64,
) -> Option<Sent> {
    let mut now = start;
    let mut slot = (start / clock.slot_s) as usize;
    let (mut left, mut mib) = (load.left, 0.0);
    while now < clock.deadline && slot < link.len() {
        *steps += 1;
        let rate = link[slot];
        let until = ((slot + 1) as f64 * clock.slot_s).min(clock.deadline);
        let span = (until - now).max(0.0);
        let stretch =
            Stretch::new(load.whole, rate, at(load.dirty, slot), span, rate * clock.pause_s);
        match stretch.send(left) {
            Step::Ends { took_s, mib: sent } => {
                let end = now + took_s;
                return (end <= clock.deadline).then_some(Sent { end, mib: mib + sent });
            }
            Step::Left(after) => (left, mib) = (after, mib + rate * span),
        }
        now = until;
        slot += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLOCK: Clock = Clock { slot_s: 300.0, now: 0.0, deadline: 3000.0, pause_s: 0.0 };

    fn sent(link: &[f64], dirty: &[f64], whole: f64, start: f64) -> Option<Sent> {
        send(&CLOCK, link, Load { whole, left: whole, dirty }, start, &mut 0)
    }

    #[test]
    fn a_guest_that_rests_takes_its_size_over_the_rate() {
        let one = sent(&[10.0; 10], &[0.0], 4500.0, 100.0).unwrap();
        assert!((one.end - 550.0).abs() < 1e-9 && (one.mib - 4500.0).abs() < 1e-9, "{one:?}");
        assert_eq!(sent(&[10.0; 10], &[0.0], 30_001.0, 0.0), None);
    }

    #[test]
    fn a_guest_that_changes_sends_more_and_one_that_outruns_the_link_never_ends() {
        let one = sent(&[10.0; 10], &[5.0], 4500.0, 0.0).unwrap();
        // (D/d) ln(b / (b - d))
        let expected = 4500.0 / 5.0 * (10.0_f64 / 5.0).ln();
        assert!((one.end - expected).abs() < 1e-6, "{one:?} {expected}");
        assert_eq!(sent(&[10.0; 10], &[10.0], 4500.0, 0.0), None);
        // It may in a slot in which it is quiet.
        let mut dirty = vec![20.0; 10];
        dirty[8] = 0.0;
        assert!(sent(&[10.0; 10], &dirty, 1500.0, 0.0).is_some());
    }

    proptest! {
        #[test]
        fn to_begin_earlier_is_never_to_end_later(
            link in prop::collection::vec(0.0..50.0_f64, 10),
            dirty in prop::collection::vec(0.0..30.0_f64, 10),
            whole in 1.0..30_000.0_f64,
            early in 0.0..1500.0_f64,
            wait in 0.0..1500.0_f64,
        ) {
            if let Some(late) = sent(&link, &dirty, whole, early + wait) {
                let soon = sent(&link, &dirty, whole, early);
                prop_assert!(soon.is_some_and(|soon| soon.end <= late.end + 1e-6), "{soon:?} {late:?}");
            }
        }
    }
}
