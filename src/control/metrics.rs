//! Numbers of an agent, and the text in which monitoring takes them.
//!
//! Invariant: the text is Prometheus' text format 0.0.4, whatever is in a label; the names in it are
//! a promise to dashboards and alerts, so one is added, never renamed.
//!
//! It is that format and not OpenMetrics because node_exporter's textfile collector reads no other,
//! and Prometheus reads both.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// The media type of [`metrics_text`].
pub const METRICS_MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How a number moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetricKind {
    /// Only up, from 0 at the agent's start.
    Counter,
    /// Up and down.
    Gauge,
}

/// One number, for each set of labels that it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Its name, with its unit.
    pub name: String,
    /// How it moves.
    pub kind: MetricKind,
    /// What it is, in a sentence.
    pub help: String,
    /// Its values; none if there is nothing to say now.
    pub samples: Vec<Sample>,
}

/// One value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Whose it is.
    pub labels: BTreeMap<String, String>,
    /// The value.
    pub value: f64,
}

impl Metric {
    /// A counter; its name ends in `_total`.
    pub fn counter(name: &str, help: &str) -> Self {
        Self::new(MetricKind::Counter, name, help)
    }

    /// A gauge.
    pub fn gauge(name: &str, help: &str) -> Self {
        Self::new(MetricKind::Gauge, name, help)
    }

    fn new(kind: MetricKind, name: &str, help: &str) -> Self {
        Self { name: name.to_owned(), kind, help: help.to_owned(), samples: Vec::new() }
    }

    /// Adds the value for these labels, each with its name in front.
    pub fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels = labels.iter().map(|(name, is)| ((*name).to_owned(), (*is).to_owned()));
        self.samples.push(Sample { labels: labels.collect(), value });
    }

    /// As [`add`](Self::add), on the way.
    #[must_use]
    pub fn with(mut self, labels: &[(&str, &str)], value: f64) -> Self {
        self.add(labels, value);
        self
    }
}

/// All of them as text, for Prometheus or node_exporter's textfile collector.
pub fn metrics_text(metrics: &[Metric]) -> String {
    let mut text = String::new();
    for metric in metrics.iter().filter(|metric| !metric.samples.is_empty()) {
        let Metric { name, kind, help, samples } = metric;
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        // Writing to a string cannot fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for Sample { labels, value } in samples {
            let labels: Vec<String> =
                labels.iter().map(|(label, is)| format!("{label}=\"{}\"", escaped(is))).collect();
            let _ = match labels.is_empty() {
                true => writeln!(text, "{name} {value}"),
                false => writeln!(text, "{name}{{{}}} {value}", labels.join(",")),
            };
        }
    }
    text
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_in_a_label_stays_in_it() {
        let metric = Metric::gauge("x_bytes", "a \\ and\na line")
            .with(&[("vm", "a\\b\"c\nd"), ("peer", "e")], 1.5)
            .with(&[], 3.0);
        assert_eq!(
            metrics_text(&[metric]),
            "# HELP x_bytes a \\\\ and\\na line\n# TYPE x_bytes gauge\n\
             x_bytes{peer=\"e\",vm=\"a\\\\b\\\"c\\nd\"} 1.5\nx_bytes 3\n"
        );
    }

    #[test]
    fn large_counts_are_written_out_and_nothing_is_said_of_nothing() {
        let bytes = Metric::counter("x_bytes_total", "Bytes.").with(&[], (1u64 << 50) as f64);
        let text = metrics_text(&[bytes, Metric::gauge("silent", "Nothing.")]);
        assert!(text.ends_with("x_bytes_total 1125899906842624\n"), "{text}");
        assert!(!text.contains("silent"), "{text}");
    }
}
