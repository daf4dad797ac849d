//! What the transport makes of a path: goodput, waste and queue over many paths, held to bounds.
//!
//! Invariant: the same seed gives the same figures.

use std::time::Duration;

use longhaul_bench::profile::Profile;
use longhaul_transport::Tuning;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use super::pair::{Figures, MIB, path, transfer};

/// Share of the link that is used once the path is known, at least.
const STEADY: f64 = 0.93;
/// Bytes that need not have been sent, at most, in percent; the start aside. Where jitter is as long as
/// the queue, acknowledgements in clumps make the path look faster than it is.
const WASTE: f64 = 4.5;
/// Round trips that a start may take until the path is full and known.
const START_ROUNDS: f64 = 16.0;

/// One of many paths.
fn nth_path(nth: u64) -> Profile {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(nth);
    let mut of = |values: &[u64]| values[random.random_range(0..values.len())];
    let (rate_mbit, rtt_ms) = (of(&[2, 10, 50, 200, 500]), of(&[5, 20, 60, 150, 300]));
    let (loss_ppm, queue_percent) = (of(&[0, 500, 3_000, 10_000]), of(&[25, 50, 100, 400]));
    let mut profile = path(rate_mbit, rtt_ms, loss_ppm as u32);
    // A sender's timers are in milliseconds, and routers know that.
    let least = (profile.rate_bits_per_s / 8 * 3 / 1000).max(64 * 1024);
    profile.queue_bytes = Some((profile.queue_bytes() * queue_percent / 100).max(least));
    profile.jitter_us = of(&[0, 0, 500, 3_000]).min(profile.rtt_us / 2);
    let jitter_ms = profile.jitter_us as f64 / 1e3;
    profile.name = format!("{}, queue {queue_percent} %, jitter {jitter_ms} ms", profile.name);
    profile
}

async fn measure(profile: &Profile, megabytes: usize, seed: u64) -> Figures {
    let figures = transfer(profile, megabytes, seed, Tuning::default()).await;
    println!(
        "{}, {megabytes} MiB, seed {seed}: {:.1} s, goodput {:.2} %, waste {:.3} %, overflow {:.3} %, \
         queueing {:.1} %, mtu {}",
        profile.name,
        figures.seconds,
        figures.goodput,
        figures.waste,
        figures.overflow,
        figures.queueing,
        figures.mtu,
    );
    figures
}

/// The lab's profiles: goodput at least in the mean, waste at most, in percent; of transfers of some 20 s.
#[tokio::test(start_paused = true)]
async fn the_labs_profiles() {
    for (name, megabytes, goodput, waste) in [
        ("metro", 512, 95.0, 0.5),
        ("continental", 512, 94.0, 0.6),
        ("intercontinental", 256, 91.0, 1.5),
        ("satellite", 256, 85.0, 3.0),
        ("bursty", 512, 94.0, 3.0),
        ("shallow", 512, 90.0, 3.0),
        ("changing", 512, 90.0, 3.0),
        ("bufferbloat", 512, 94.0, 0.6),
    ] {
        let profile = Profile::named(name).unwrap();
        let mut mean = 0.0;
        for seed in [1, 2, 3] {
            let figures = measure(&profile, megabytes, seed).await;
            mean += figures.goodput / 3.0;
            assert!(figures.goodput >= goodput - 2.0, "{name}: {figures:?}");
            assert!(figures.waste <= waste, "{name}: {figures:?}");
            assert!(name != "bufferbloat" || figures.queueing <= 25.0, "{name}: {figures:?}");
        }
        assert!(mean >= goodput, "{name}: {mean}");
    }
}

#[tokio::test(start_paused = true)]
async fn sixty_four_paths() {
    for nth in 0..64 {
        let profile = nth_path(nth);
        let rate = profile.rate_bits_per_s as f64 / 8.0;
        let start_s = START_ROUNDS * profile.rtt().as_secs_f64();
        let megabytes = ((rate * (2.0 + start_s)) as usize / MIB).max(4);
        let figures = measure(&profile, megabytes, nth).await;
        let ideal_s = (figures.seconds * figures.goodput / 100.0) / STEADY;
        assert!(
            figures.seconds <= ideal_s + start_s + 0.25,
            "{} > {ideal_s}: {figures:?}",
            figures.seconds
        );
        // What the start puts into a queue that is too small for it.
        let start = profile.carried_bytes(Duration::ZERO, profile.rtt()) / (megabytes * MIB) as f64;
        assert!(figures.waste <= WASTE + 100.0 * start, "{start}: {figures:?}");
    }
}

/// On a short path what jitter adds to a round trip is no queue that a session would have to leave.
#[tokio::test(start_paused = true)]
async fn jitter_is_no_queue() {
    let profile = Profile {
        jitter_us: 2_500,
        queue_bytes: Some(4 * path(500, 5, 3_000).queue_bytes()),
        ..path(500, 5, 3_000)
    };
    for seed in 14..22 {
        let figures = measure(&profile, 64, seed).await;
        assert!(figures.goodput >= 92.0, "{figures:?}");
    }
}
