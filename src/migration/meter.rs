//! Counts what an attempt moves and saves, phase by phase, for progress and report.
//!
//! Invariant: it counts what happened and decides nothing; times come from its caller as
//! milliseconds since the start, wire bytes as the transport's total.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::report::{Completed, Downtime, Phase, PhaseReport, Progress, Saved};

/// Time over which a rate is taken.
const RATE_WINDOW_MS: u64 = 3_000;
/// Samples kept for it; more than one a tick never come.
const RATE_SAMPLES_MAX: usize = 256;

/// Coded bytes for a byte of memory, before any of it was coded: Debian guests had 0.15 to 0.3.
const LATER_CODED_SHARE: f64 = 0.25;

/// The counters of one attempt.
#[derive(Debug)]
pub(super) struct Meter {
    vm: String,
    peer: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    began_ms: u64,
    began_wire: u64,
    current: PhaseReport,
    expected_bytes: u64,
    /// Payload of this phase that took no time: zeros.
    zero_bytes: u64,
    /// Payload of phases to come.
    later_bytes: u64,
    done: Vec<(Phase, PhaseReport)>,
    saved: Saved,
    notes: Vec<String>,
    note: Option<String>,
    wire_rate: RecentRate,
}

/// The rate of a count over the last seconds.
#[derive(Debug, Default)]
pub(super) struct RecentRate {
    samples: VecDeque<(u64, u64)>,
}

impl Meter {
    /// A meter whose time starts with `phase`.
    pub(super) fn new(vm: &str, peer: &str, phase: Phase) -> Self {
        let state = State {
            phase,
            began_ms: 0,
            began_wire: 0,
            current: PhaseReport::default(),
            expected_bytes: 0,
            zero_bytes: 0,
            later_bytes: 0,
            done: Vec::new(),
            saved: Saved::default(),
            notes: Vec::new(),
            note: None,
            wire_rate: RecentRate::default(),
        };
        Self { vm: vm.to_owned(), peer: peer.to_owned(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves plain numbers behind, never a broken state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next phase begins.
    pub(super) fn begin(&self, phase: Phase, at_ms: u64, wire_bytes: u64) {
        let mut state = self.state();
        state.end_phase(at_ms, wire_bytes);
        state.phase = phase;
    }

    /// A round of the phase begins.
    pub(super) fn round(&self) -> u32 {
        let mut state = self.state();
        state.current.rounds += 1;
        state.current.rounds
    }

    /// So many payload bytes will have to be dealt with, beside what was announced before.
    pub(super) fn expect(&self, bytes: u64) {
        self.state().expected_bytes += bytes;
    }

    /// So many payload bytes are ahead in this phase now, by the latest count.
    pub(super) fn ahead(&self, bytes: u64, rounds: u32) {
        let mut state = self.state();
        state.expected_bytes = state.current.payload_bytes + bytes;
        state.current.rounds = rounds;
    }

    /// So many payload bytes will have to be dealt with in phases to come.
    pub(super) fn later(&self, bytes: u64) {
        self.state().later_bytes = bytes;
    }

    /// Something for the operator's eyes, now and in the report.
    pub(super) fn note(&self, note: impl Into<String>) {
        let mut state = self.state();
        let note = note.into();
        state.note = Some(note.clone());
        if !state.notes.contains(&note) {
            state.notes.push(note);
        }
    }

    pub(super) fn disk_zero(&self, bytes: u64) {
        let mut state = self.state();
        state.current.payload_bytes += bytes;
        state.zero_bytes += bytes;
        state.saved.disk_zero_bytes += bytes;
    }

    pub(super) fn disk_known(&self, bytes: u64) {
        let mut state = self.state();
        state.current.payload_bytes += bytes;
        state.saved.disk_known_bytes += bytes;
    }

    pub(super) fn disk_sent(&self, payload: u64, coded: u64) {
        let mut state = self.state();
        state.current.payload_bytes += payload;
        state.saved.disk_compressed_bytes += payload.saturating_sub(coded);
    }

    /// A batch of pages was coded; `forms` says what each form saved.
    pub(super) fn memory(&self, payload: u64, forms: &Saved) {
        let mut state = self.state();
        state.current.payload_bytes += payload;
        state.saved.memory_zero_bytes += forms.memory_zero_bytes;
        state.saved.memory_repeated_bytes += forms.memory_repeated_bytes;
        state.saved.memory_on_disk_bytes += forms.memory_on_disk_bytes;
        state.saved.memory_delta_bytes += forms.memory_delta_bytes;
        state.saved.memory_compressed_bytes += forms.memory_compressed_bytes;
    }

    pub(super) fn superseded(&self, bytes: u64) {
        self.state().saved.memory_superseded_bytes = bytes;
    }

    /// What is to be shown now.
    pub(super) fn progress(&self, at_ms: u64, wire_bytes: u64) -> Progress {
        let mut state = self.state();
        let rate = state.wire_rate.bits_per_s(at_ms, wire_bytes);
        let total = state.expected_bytes.max(state.current.payload_bytes);
        let spent_ms = at_ms.saturating_sub(state.began_ms);
        let done = state.current.payload_bytes;
        // The pace of this phase so far, and what is to come at the present rate; nothing is promised
        // before there is a pace.
        let paced = done - state.zero_bytes.min(done);
        let forecast_left_ms = (paced > 0 && rate > 0 && spent_ms > 1000).then(|| {
            let here_ms = (total - done) as f64 / paced as f64 * spent_ms as f64;
            let later_ms = state.later_bytes as f64 * LATER_CODED_SHARE * 8000.0 / rate as f64;
            (here_ms + later_ms) as u64
        });
        Progress {
            vm: self.vm.clone(),
            peer: self.peer.clone(),
            phase: state.phase,
            round: state.current.rounds.max(1),
            payload_bytes: done,
            payload_bytes_total: total,
            wire_bytes,
            rate_bits_per_s: rate,
            elapsed_ms: at_ms,
            forecast_left_ms,
            note: state.note.take(),
            link: None,
        }
    }

    /// The report.
    pub(super) fn complete(
        &self,
        at_ms: u64,
        wire_bytes: u64,
        downtime: Option<Downtime>,
    ) -> Completed {
        let mut state = self.state();
        state.end_phase(at_ms, wire_bytes);
        Completed {
            vm: self.vm.clone(),
            peer: self.peer.clone(),
            total_ms: at_ms,
            downtime,
            phases: state
                .done
                .iter()
                .map(|(phase, report)| (phase.to_string(), report.clone()))
                .collect(),
            saved: state.saved.clone(),
            wire_bytes,
            payload_bytes: state.done.iter().map(|(_, report)| report.payload_bytes).sum(),
            notes: state.notes.clone(),
            link: None,
            image: None,
        }
    }
}

impl RecentRate {
    /// The rate, now that so many bytes are counted in all.
    pub(super) fn bits_per_s(&mut self, at_ms: u64, bytes: u64) -> u64 {
        let samples = &mut self.samples;
        samples.push_back((at_ms, bytes));
        while samples.len() > RATE_SAMPLES_MAX
            || samples.front().is_some_and(|&(at, _)| at + RATE_WINDOW_MS < at_ms)
        {
            samples.pop_front();
        }
        match (samples.front(), samples.back()) {
            (Some(&(from, first)), Some(&(to, last))) if to > from => {
                last.saturating_sub(first) * 8 * 1000 / (to - from)
            }
            _ => 0,
        }
    }
}

impl State {
    fn end_phase(&mut self, at_ms: u64, wire_bytes: u64) {
        let mut ended = std::mem::take(&mut self.current);
        ended.duration_ms = at_ms.saturating_sub(self.began_ms);
        ended.wire_bytes = wire_bytes.saturating_sub(self.began_wire);
        if ended.duration_ms > 0 || ended.payload_bytes > 0 {
            self.done.push((self.phase, ended));
        }
        self.began_ms = at_ms;
        self.began_wire = wire_bytes;
        self.expected_bytes = 0;
        self.zero_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_time_go_to_the_phase_they_were_spent_in() {
        let meter = Meter::new("web", "dc2", Phase::Seed);
        meter.expect(1000);
        meter.disk_sent(1000, 400);
        meter.begin(Phase::PreCopy, 2_000, 500);
        meter.memory(4096, &Saved { memory_zero_bytes: 4096, ..Saved::default() });
        let report = meter.complete(3_500, 800, None);
        assert_eq!(report.phases.len(), 2);
        assert_eq!(report.phases[0].0, "seed");
        assert_eq!(report.phases[0].1.wire_bytes, 500);
        assert_eq!(report.phases[1].1.duration_ms, 1_500);
        assert_eq!(report.payload_bytes, 5096);
        assert_eq!(report.saved.disk_compressed_bytes, 600);
    }

    #[test]
    fn the_forecast_follows_the_pace_of_what_took_time_and_knows_what_comes_later() {
        let meter = Meter::new("web", "dc2", Phase::Seed);
        meter.expect(104_000);
        meter.disk_zero(100_000);
        meter.disk_sent(1000, 1000);
        meter.progress(0, 0);
        assert_eq!(meter.progress(2_000, 1000).forecast_left_ms, Some(6_000));
        // 2000 coded bytes at 500 a second.
        meter.later(8000);
        assert_eq!(meter.progress(2_000, 1000).forecast_left_ms, Some(10_000));
    }

    #[test]
    fn what_is_ahead_may_grow_again() {
        let meter = Meter::new("web", "dc2", Phase::PreCopy);
        meter.ahead(5000, 1);
        meter.memory(4096, &Saved::default());
        meter.ahead(5000, 2);
        let now = meter.progress(0, 0);
        assert_eq!((now.payload_bytes, now.payload_bytes_total, now.round), (4096, 9096, 2));
    }

    #[test]
    fn the_rate_is_of_the_last_seconds() {
        let meter = Meter::new("web", "dc2", Phase::Seed);
        meter.progress(0, 0);
        meter.progress(10_000, 1_000_000);
        assert_eq!(meter.progress(11_000, 1_500_000).rate_bits_per_s, 4_000_000);
    }
}
