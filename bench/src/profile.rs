//! What a WAN is like: named profiles and free parameters.
//!
//! Invariant: a [`Profile`] that came out of this module is usable: its rate is above zero, its
//! probabilities are in 0..=1 and its queue holds at least a few packets.
//!
//! A profile describes both directions alike. The round trip is split in halves, loss and queue
//! apply to each direction on its own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// A link: what one direction of the WAN does to packets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name for result rows.
    pub name: String,
    /// Bits a second of each direction, counted in IP bytes.
    pub rate_bits_per_s: u64,
    /// Round trip of an empty link in microseconds; each direction has half of it.
    #[serde(default)]
    pub rtt_us: u64,
    /// Extra delay of each packet, evenly spread from 0 to this many microseconds. Packets keep
    /// their order.
    #[serde(default)]
    pub jitter_us: u64,
    /// Probability that a packet is lost on its way, in each direction.
    #[serde(default)]
    pub loss: f64,
    /// Loss that comes in bursts, on top of `loss`.
    #[serde(default)]
    pub burst: Option<Burst>,
    /// Rates that follow each other in the place of the one rate, over and over.
    #[serde(default)]
    pub trace: Option<Trace>,
    /// Bytes that wait before the bottleneck until the tail is dropped; one bandwidth-delay product
    /// if absent, see [`Profile::queue_bytes`].
    #[serde(default)]
    pub queue_bytes: Option<u64>,
    /// Largest IP packet in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
}

/// Gilbert-Elliott loss: the link is in a good or a bad state and may change it at every packet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Probability at each packet that a good link turns bad.
    pub start: f64,
    /// Probability at each packet that a bad link turns good.
    pub stop: f64,
    /// Probability that a packet is lost while the link is bad.
    pub loss: f64,
}

/// A rate that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// How long each rate holds, in microseconds.
    pub step_us: u64,
    /// The rates in bits a second, each above zero.
    pub rates_bits_per_s: Vec<u64>,
}

/// Smallest default queue: routers have at least this, also where delay is near zero.
const QUEUE_BYTES_MIN: u64 = 256 * 1024;
/// Largest queue that can be asked for; beyond it a packet would wait for minutes.
const QUEUE_BYTES_MAX: u64 = 1 << 30;
/// Fastest link that can be asked for: no user-space relay is near it.
const RATE_BITS_PER_S_MAX: u64 = 100_000_000_000;
/// Longest round trip and jitter that can be asked for.
const DELAY_US_MAX: u64 = 60_000_000;
/// Packets that any queue must be able to hold, in MTUs.
const QUEUE_PACKETS_MIN: u64 = 4;
/// Largest MTU: the relay's packet buffers are this big at most.
pub const MTU_MAX: u16 = 9000;

fn default_mtu() -> u16 {
    1500
}

/// The names that [`Profile::named`] knows.
pub const NAMES: [&str; 9] = [
    "metro",
    "continental",
    "intercontinental",
    "satellite",
    "bursty",
    "bufferbloat",
    "shallow",
    "changing",
    "direct",
];

impl Profile {
    /// One of the lab's own profiles, or `None` for a name that it does not have.
    ///
    /// `metro`: 1 Gbit/s, 5 ms, no loss. `continental`: 200 Mbit/s, 80 ms, 0.1 %.
    /// `intercontinental`: 100 Mbit/s, 200 ms, 0.5 %. `satellite`: 50 Mbit/s, 600 ms, 1 %.
    /// As `continental`, but `bursty`: 0.5 % lost, in bursts of ten packets; `bufferbloat`: a queue of
    /// eight bandwidth-delay products; `shallow`: of a tenth of one; `changing`: the rate changes
    /// every three seconds. `direct`: 10 Gbit/s without delay, for tests.
    pub fn named(name: &str) -> Option<Self> {
        let (rate_mbit, rtt_ms, loss) = match name {
            "metro" => (1_000, 5, 0.0),
            "continental" | "bufferbloat" | "shallow" | "changing" => (200, 80, 0.001),
            "bursty" => (200, 80, 0.0),
            "intercontinental" => (100, 200, 0.005),
            "satellite" => (50, 600, 0.01),
            "direct" => (10_000, 0, 0.0),
            _ => return None,
        };
        let mut profile = Self {
            name: name.to_owned(),
            rate_bits_per_s: rate_mbit * 1_000_000,
            rtt_us: rtt_ms * 1_000,
            jitter_us: 0,
            loss,
            burst: None,
            trace: None,
            queue_bytes: None,
            mtu: default_mtu(),
        };
        match name {
            // Half of the packets of a bad state that lasts ten: 0.5 % in all.
            "bursty" => profile.burst = Some(Burst { start: 0.001_01, stop: 0.1, loss: 0.5 }),
            "bufferbloat" => profile.queue_bytes = Some(8 * profile.queue_bytes()),
            "shallow" => profile.queue_bytes = Some(profile.queue_bytes() / 10),
            "changing" => {
                let rates_bits_per_s =
                    [200, 60, 150, 30, 120, 200, 90].map(|mbit| mbit * 1_000_000);
                profile.trace =
                    Some(Trace { step_us: 3_000_000, rates_bits_per_s: rates_bits_per_s.to_vec() });
            }
            // Without delay a bandwidth-delay product is nothing; a host's burst must fit.
            "direct" => profile.queue_bytes = Some(8 << 20),
            _ => {}
        }
        Some(profile)
    }

    /// A named profile, or the TOML file of that path (its keys are this type's fields).
    ///
    /// # Errors
    ///
    /// When it is neither, or the file's values make no link.
    pub fn find(name_or_file: &str) -> Result<Self> {
        if let Some(profile) = Self::named(name_or_file) {
            return Ok(profile);
        }
        let path = Path::new(name_or_file);
        ensure!(
            path.is_file(),
            "there is no profile {name_or_file:?}: use {} or a TOML file",
            NAMES.join(", ")
        );
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("while reading the profile {}", path.display()))?;
        let profile: Self = toml::from_str(&text)
            .with_context(|| format!("while reading the profile {}", path.display()))?;
        profile.checked().with_context(|| format!("in the profile {}", path.display()))
    }

    /// The profile itself if it describes a link that the lab can be.
    ///
    /// # Errors
    ///
    /// Names the value that is out of its range.
    pub fn checked(self) -> Result<Self> {
        ensure!(
            (1..=RATE_BITS_PER_S_MAX).contains(&self.rate_bits_per_s),
            "the rate of {} bit/s is not in 1..={RATE_BITS_PER_S_MAX}",
            self.rate_bits_per_s
        );
        if let Some(trace) = &self.trace {
            ensure!(trace.step_us > 0, "a rate must hold for some time");
            ensure!(!trace.rates_bits_per_s.is_empty(), "a trace needs a rate");
            let well = |rate: &u64| (1..=RATE_BITS_PER_S_MAX).contains(rate);
            ensure!(trace.rates_bits_per_s.iter().all(well), "a rate of the trace is out of range");
        }
        for (what, us) in [("round trip", self.rtt_us), ("jitter", self.jitter_us)] {
            ensure!(us <= DELAY_US_MAX, "the {what} of {us} us is above {DELAY_US_MAX}");
        }
        let burst = self.burst.unwrap_or(Burst { start: 0.0, stop: 0.0, loss: 0.0 });
        for probability in [self.loss, burst.start, burst.stop, burst.loss] {
            ensure!((0.0..=1.0).contains(&probability), "{probability} is not a probability");
        }
        ensure!(
            (576..=MTU_MAX).contains(&self.mtu),
            "the MTU of {} bytes is not in 576..={MTU_MAX}",
            self.mtu
        );
        let queue = self.queue_bytes();
        let floor = QUEUE_PACKETS_MIN * u64::from(self.mtu);
        ensure!(
            (floor..=QUEUE_BYTES_MAX).contains(&queue),
            "the queue of {queue} bytes is not in {floor}..={QUEUE_BYTES_MAX}"
        );
        Ok(self)
    }

    /// The rate at a moment since the link's start.
    pub fn rate_at(&self, at_ns: u64) -> u64 {
        self.trace.as_ref().map_or(self.rate_bits_per_s, |trace| {
            let step = at_ns / 1_000 / trace.step_us;
            let rates = &trace.rates_bits_per_s;
            rates[step as usize % rates.len()]
        })
    }

    /// Bytes that the bottleneck can send from one moment since the link's start to another.
    pub fn carried_bytes(&self, from: Duration, to: Duration) -> f64 {
        let step_s = self.trace.as_ref().map_or(f64::INFINITY, |trace| trace.step_us as f64 / 1e6);
        let (mut at, end) = (from.as_secs_f64(), to.as_secs_f64());
        let mut bits = 0.0;
        while at < end {
            let next = (((at / step_s).floor() + 1.0) * step_s).min(end);
            bits += self.rate_at((next.midpoint(at) * 1e9) as u64) as f64 * (next - at);
            at = next;
        }
        bits / 8.0
    }

    /// Bytes that fit before the bottleneck of each direction.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes.unwrap_or_else(|| {
            let product = u128::from(self.rate_bits_per_s) * u128::from(self.rtt_us) / 8_000_000;
            u64::try_from(product).unwrap_or(u64::MAX).clamp(QUEUE_BYTES_MIN, QUEUE_BYTES_MAX)
        })
    }

    /// Delay of one direction of an empty link.
    pub fn one_way(&self) -> Duration {
        Duration::from_nanos(self.rtt_us * 500)
    }

    /// Round trip of an empty link.
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us)
    }
}

/// Parameters that replace single values of a profile; every one that is set adds to its name.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Overrides {
    /// Rate of each direction: `200mbit`, `1gbit`, `512kbit`.
    #[arg(long, value_parser = parse_rate)]
    pub rate: Option<u64>,
    /// Round trip: `80ms`, `500us`, `1s`.
    #[arg(long, value_parser = parse_delay)]
    pub rtt: Option<u64>,
    /// Extra delay of each packet, evenly spread from 0: `3ms`.
    #[arg(long, value_parser = parse_delay)]
    pub jitter: Option<u64>,
    /// Random loss of each direction: `0.1%` or `0.001`.
    #[arg(long, value_parser = parse_probability)]
    pub loss: Option<f64>,
    /// Burst loss (Gilbert-Elliott), three probabilities START,STOP,LOSS: `0.01%,10%,50%`.
    #[arg(long, value_parser = parse_burst)]
    pub burst: Option<Burst>,
    /// Bytes before the bottleneck: `2mib`, `64kib`, `300000`.
    #[arg(long, value_parser = parse_bytes)]
    pub queue: Option<u64>,
    /// Largest IP packet in bytes.
    #[arg(long)]
    pub mtu: Option<u16>,
}

impl Overrides {
    /// The profile with these values in the place of its own.
    ///
    /// # Errors
    ///
    /// When the result makes no link, see [`Profile::checked`].
    pub fn apply(&self, mut profile: Profile) -> Result<Profile> {
        let before = profile.clone();
        profile.rate_bits_per_s = self.rate.unwrap_or(profile.rate_bits_per_s);
        profile.rtt_us = self.rtt.unwrap_or(profile.rtt_us);
        profile.jitter_us = self.jitter.unwrap_or(profile.jitter_us);
        profile.loss = self.loss.unwrap_or(profile.loss);
        profile.burst = self.burst.or(profile.burst);
        profile.queue_bytes = self.queue.or(profile.queue_bytes);
        profile.mtu = self.mtu.unwrap_or(profile.mtu);
        // A row must never show a profile's name for a link that is another one.
        if profile != before && !profile.name.ends_with('*') {
            profile.name.push('*');
        }
        profile.checked()
    }
}

/// Splits `200mbit` into 200 and `mbit`.
fn number_and_unit(text: &str) -> Result<(f64, String)> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic() || c == '%').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let value: f64 =
        number.trim().parse().with_context(|| format!("{text:?} does not start with a number"))?;
    ensure!(value.is_finite() && value >= 0.0, "{text:?} must not be negative");
    Ok((value, unit.to_ascii_lowercase()))
}

/// Rounds to a whole number; values of a lab are far below where `f64` loses whole numbers.
fn whole(value: f64) -> u64 {
    value.round() as u64
}

fn parse_rate(text: &str) -> Result<u64> {
    let (value, unit) = number_and_unit(text)?;
    let scale = match unit.as_str() {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => bail!("{text:?}: a rate ends in kbit, mbit or gbit"),
    };
    Ok(whole(value * scale))
}

fn parse_delay(text: &str) -> Result<u64> {
    let (value, unit) = number_and_unit(text)?;
    let scale = match unit.as_str() {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        _ => bail!("{text:?}: a delay ends in us, ms or s"),
    };
    Ok(whole(value * scale))
}

fn parse_probability(text: &str) -> Result<f64> {
    let (value, unit) = number_and_unit(text)?;
    match unit.as_str() {
        "%" => Ok(value / 100.0),
        "" => Ok(value),
        _ => bail!("{text:?}: write 0.1% or 0.001"),
    }
}

fn parse_burst(text: &str) -> Result<Burst> {
    let parts: Vec<f64> = text.split(',').map(parse_probability).collect::<Result<_>>()?;
    let &[start, stop, loss] = parts.as_slice() else {
        bail!("{text:?}: burst loss has three parts, START,STOP,LOSS");
    };
    Ok(Burst { start, stop, loss })
}

/// Parses a size such as `64kib`, `2mib`, `1gib` or plain bytes.
///
/// # Errors
///
/// When it is not a number with one of these units.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let (value, unit) = number_and_unit(text)?;
    let scale = match unit.as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1024.0 * 1024.0,
        "gib" | "g" => 1024.0 * 1024.0 * 1024.0,
        _ => bail!("{text:?}: a size ends in kib, mib or gib"),
    };
    Ok(whole(value * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_is_one_bandwidth_delay_product() {
        for (name, bytes) in [
            ("metro", 625_000),
            ("continental", 2_000_000),
            ("intercontinental", 2_500_000),
            ("direct", 8 << 20),
        ] {
            let profile = Profile::named(name).unwrap().checked().unwrap();
            assert_eq!(profile.queue_bytes(), bytes, "{name}");
        }
    }

    #[test]
    fn what_is_carried_follows_the_trace() {
        let mut profile = Profile::named("metro").unwrap();
        let carried = |profile: &Profile, from, to| {
            profile.carried_bytes(Duration::from_secs_f64(from), Duration::from_secs_f64(to))
        };
        assert_eq!(carried(&profile, 1.0, 3.0), 250e6);
        profile.trace = Some(Trace { step_us: 1_000_000, rates_bits_per_s: vec![8, 80, 800] });
        assert!((carried(&profile, 0.5, 3.25) - (0.5 + 10.0 + 100.0 + 0.25)).abs() < 1e-6);
    }

    #[test]
    fn every_name_is_known_and_usable() {
        for name in NAMES {
            Profile::find(name).unwrap();
        }
        assert!(Profile::find("no-such-profile").is_err());
    }

    #[test]
    fn an_override_marks_the_name() {
        let overrides = Overrides { loss: Some(0.02), ..Overrides::default() };
        let profile = overrides.apply(Profile::named("metro").unwrap()).unwrap();
        assert_eq!((profile.name.as_str(), profile.loss), ("metro*", 0.02));
        let same = Overrides::default().apply(Profile::named("metro").unwrap()).unwrap();
        assert_eq!(same.name, "metro");
    }

    #[test]
    fn units_are_read_and_others_refused() {
        assert_eq!(parse_rate("2.5gbit").unwrap(), 2_500_000_000);
        assert_eq!(parse_delay("80ms").unwrap(), 80_000);
        assert_eq!(parse_bytes("64KiB").unwrap(), 65_536);
        assert!((parse_probability("0.1%").unwrap() - 0.001).abs() < 1e-12);
        let burst = parse_burst("0.01,10%,0.5").unwrap();
        assert_eq!((burst.start, burst.stop, burst.loss), (0.01, 0.1, 0.5));
        for bad in ["fast", "10mbyte", "-1mbit"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
        assert!(parse_delay("5").is_err());
    }

    #[test]
    fn values_out_of_range_are_refused() {
        let refused = |change: fn(&mut Profile)| {
            let mut profile = Profile::named("metro").unwrap();
            change(&mut profile);
            assert!(profile.clone().checked().is_err(), "{profile:?}");
        };
        refused(|p| p.rate_bits_per_s = 0);
        refused(|p| p.loss = 1.5);
        refused(|p| p.queue_bytes = Some(100));
        refused(|p| p.mtu = 20);
        refused(|p| p.rtt_us = u64::MAX);
    }

    #[test]
    fn a_file_is_a_profile() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "name = \"sat\"\nrate_bits_per_s = 20000000\nrtt_us = 600000\n\
             burst = { start = 0.001, stop = 0.2, loss = 0.5 }\n",
        )
        .unwrap();
        let profile = Profile::find(file.path().to_str().unwrap()).unwrap();
        assert_eq!((profile.name.as_str(), profile.queue_bytes()), ("sat", 1_500_000));
    }
}
