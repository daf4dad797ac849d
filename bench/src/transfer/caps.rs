//! Caps on a flow over this product's transport, changed while it sends, and how they were kept.
//!
//! Invariant: what is compared with a cap is what arrived at the receiver's device, all headers in it, from
//! [`SETTLE`] after each change on; from the first cap's beginning on.

use std::str::FromStr;
use std::time::Duration;

use longhaul_transport::{BitRate, JobRate};
use serde::{Deserialize, Serialize};

use super::account::bytes_at;
use super::{Sample, account};

/// How long a changed cap may take to hold.
const SETTLE: Duration = Duration::from_millis(500);
/// A cap holds in any span of this length, looked at every [`STEP_US`].
const SPAN_US: u64 = 1_000_000;
const STEP_US: u64 = 50_000;

/// A cap from so many seconds after the first byte on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cap {
    /// When.
    pub from_s: f64,
    /// How much.
    pub rate: BitRate,
}

/// Caps in the order of their times, as in `0=20M,10=5M`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Caps(Vec<Cap>);

/// How one cap was kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// The cap.
    #[serde(flatten)]
    pub cap: Cap,
    /// The most that arrived in any second, over the cap.
    pub most: f64,
    /// What arrived in all, over the cap.
    pub used: f64,
}

impl FromStr for Caps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cap = |part: &str| {
            let (from_s, rate) = part.split_once('=')?;
            let from_s = from_s.parse().ok().filter(|s: &f64| s.is_finite() && *s >= 0.0)?;
            Some(Cap { from_s, rate: rate.parse().ok()? })
        };
        let caps: Option<Vec<Cap>> = text.split(',').map(cap).collect();
        let caps = caps.filter(|caps| caps.is_sorted_by(|a, b| a.from_s < b.from_s));
        caps.map(Self).ok_or_else(|| "caps are SECOND=RATE in order, e.g. 0=20M,10=5M".to_owned())
    }
}

impl Caps {
    /// Whether there is any.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What holds from the first byte on.
    pub(super) fn first(&self) -> Option<BitRate> {
        self.0.first().filter(|cap| cap.from_s == 0.0).map(|cap| cap.rate)
    }

    /// Sets each when its time has come, from now on.
    pub(super) async fn follow(&self, job: &JobRate) {
        let began = tokio::time::Instant::now();
        for cap in &self.0 {
            tokio::time::sleep_until(began + Duration::from_secs_f64(cap.from_s)).await;
            job.set_job(Some(cap.rate));
        }
        std::future::pending().await
    }

    /// How they were kept by a flow that began and ended at these moments.
    pub(super) fn kept(&self, samples: &[Sample], began_us: u64, ended_us: u64) -> Vec<Kept> {
        let at = |cap: &Cap| began_us + (cap.from_s * 1e6) as u64;
        let ends = self.0.iter().skip(1).map(at).chain([ended_us]);
        let kept = self.0.iter().zip(ends).enumerate().filter_map(|(nth, (cap, to))| {
            let settle = if nth == 0 { 0 } else { SETTLE.as_micros() as u64 };
            let from = at(cap) + settle;
            let bytes = |from, to| {
                bytes_at(samples, account::of_device, to)
                    - bytes_at(samples, account::of_device, from)
            };
            let over = |from: u64, to: u64| {
                bytes(from, to) * 8e6 / (to - from) as f64 / cap.rate.bits_per_second() as f64
            };
            let last = to.checked_sub(SPAN_US).filter(|last| *last > from)?;
            let starts = (from..=last).step_by(STEP_US as usize);
            let most = starts.map(|start| over(start, start + SPAN_US)).fold(0.0, f64::max);
            // What a start takes to get there is no cap's.
            let used = over(from.max(at(cap) + SPAN_US / 2), to);
            Some(Kept { cap: *cap, most, used })
        });
        kept.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_that_is_too_full_is_seen_and_one_while_a_cap_settles_is_not() {
        let caps: Caps = "0=8M,4=4M".parse().unwrap();
        // 8 Mbit/s for 4.4 s, then 4, and 8 again from 7.4 to 7.6 s.
        let rate = |ms: u64| if ms < 4_400 || (7_400..7_600).contains(&ms) { 1_000 } else { 500 };
        let mut bytes = 0;
        let samples: Vec<Sample> = (0..10_000)
            .step_by(10)
            .map(|ms| {
                let sample =
                    Sample { at_us: 5_000_000 + ms * 1_000, flow_bytes: 0, device_bytes: bytes };
                bytes += rate(ms) * 10;
                sample
            })
            .collect();
        let kept = caps.kept(&samples, 5_000_000, 15_000_000);
        assert!((kept[0].most - 1.0).abs() < 1e-3 && (kept[0].used - 1.0).abs() < 1e-3, "{kept:?}");
        assert!((kept[1].most - 1.2).abs() < 1e-2, "{kept:?}");
        for bad in ["", "20M", "0=", "5=1M,5=2M", "-1=2M", "nan=2M"] {
            assert!(bad.parse::<Caps>().is_err(), "{bad}");
        }
    }
}
