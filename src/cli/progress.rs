//! Progress of a job: a bar on a terminal, a line every two seconds without one, JSON if asked.
//!
//! Invariant: progress is never the result: it goes to stderr (with `--json` to stdout, as one
//! document per event), and a reader that misses all of it misses nothing that matters.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::print_json;
use crate::control::{Event, IndexProgress, JobSummary};
use crate::migration::Progress;
use crate::units::{ByteCount, duration_text, rate_text};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Where events of a job go.
pub(super) enum Display {
    /// A bar that is drawn over.
    Terminal(ProgressBar),
    /// Lines, at most one per interval and one for each change of phase.
    Lines {
        /// When and in which phase and round the last one was written.
        last: Option<(Instant, Progress)>,
    },
    /// Everything, as it comes.
    Json,
}

impl Display {
    pub(super) fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { last: None };
        }
        let bar = ProgressBar::new(1);
        // A template that is known to be right: it is a constant.
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent:>3} %\n{msg}") {
            bar.set_style(style);
        }
        Self::Terminal(bar)
    }

    pub(super) fn show(&mut self, event: &Event) {
        match (self, event) {
            (Self::Json, event) => print_json(event),
            (Self::Terminal(bar), Event::Progress(progress)) => {
                bar.set_length(progress.payload_bytes_total.max(1));
                bar.set_position(progress.payload_bytes);
                bar.set_message(line(progress));
            }
            (Self::Terminal(bar), Event::Indexing(progress)) => {
                bar.set_length(progress.total.max(1));
                bar.set_position(progress.read);
                bar.set_message(indexing(progress));
            }
            (Self::Terminal(bar), event) => bar.println(words(event)),
            (Self::Lines { last }, Event::Progress(progress)) => {
                let now = Instant::now();
                let due = last.as_ref().is_none_or(|(then, before)| {
                    now.duration_since(*then) >= LINE_INTERVAL || before.phase != progress.phase
                });
                if due {
                    eprintln!("{}", line(progress));
                    *last = Some((now, progress.clone()));
                }
            }
            (Self::Lines { .. }, event) => eprintln!("{}", words(event)),
        }
    }

    /// Takes the bar away, so that the report stands alone.
    pub(super) fn finish(self) {
        if let Self::Terminal(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn words(event: &Event) -> String {
    match event {
        Event::Admitted(JobSummary { id, kind, vm, peer, .. }) => {
            format!("job {id}: {kind} {vm} {} {peer}", kind.preposition())
        }
        Event::Progress(progress) => line(progress),
        Event::Indexing(progress) => indexing(progress),
        Event::Note(note) => note.clone(),
    }
}

fn indexing(progress: &IndexProgress) -> String {
    let IndexProgress { image, read, total } = progress;
    match image.as_str() {
        "" => format!("index: {read} of {total} entries"),
        image => format!("{image}: {} of at most {}", ByteCount(*read), ByteCount(*total)),
    }
}

/// A moment of a job in one line.
pub(super) fn line(progress: &Progress) -> String {
    let mut line = format!(
        "{} {}: {} of {}, wire {}, {}",
        progress.phase,
        progress.round,
        ByteCount(progress.payload_bytes),
        ByteCount(progress.payload_bytes_total),
        ByteCount(progress.wire_bytes),
        rate_text(progress.rate_bits_per_s),
    );
    match progress.forecast_left_ms {
        Some(left) => line += &format!(", about {} left", duration_text(left)),
        None => line += &format!(", {} so far", duration_text(progress.elapsed_ms)),
    }
    if let Some(note) = &progress.note {
        line += &format!(" ({note})");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Phase;

    #[test]
    fn a_moment_is_one_line() {
        let mut progress = Progress {
            vm: "db1".into(),
            peer: "lyon".into(),
            phase: Phase::PreCopy,
            round: 2,
            payload_bytes: 1 << 30,
            payload_bytes_total: 4 << 30,
            wire_bytes: 312 << 20,
            rate_bits_per_s: 18_300_000,
            elapsed_ms: 61_000,
            forecast_left_ms: Some(125_000),
            note: None,
            link: None,
        };
        assert_eq!(
            line(&progress),
            "pre-copy 2: 1.0 GiB of 4.0 GiB, wire 312.0 MiB, 18.3 Mbit/s, about 2 min 5 s left"
        );
        progress.forecast_left_ms = None;
        progress.note = Some("link down for 3 s, trying again".into());
        assert!(line(&progress).ends_with("1 min 1 s so far (link down for 3 s, trying again)"));
    }
}
