//! A real WAN between two real namespaces: what its profile promises, and that nothing stays.
//!
//! Needs root, /dev/net/tun and iproute2; without them every test here says that it was skipped.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use longhaul_bench::netns::{self, Side};
use longhaul_bench::profile::Profile;
use longhaul_bench::speed;
use longhaul_bench::wan::{self, Spec, Wan};

/// The lab's binary as cargo built it for this test.
fn lab() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_lab"))
}

/// A WAN of 50 Mbit/s and 40 ms: slow enough for a busy machine to keep up with.
fn spec(test: &str) -> Spec {
    let metro = Profile::named("metro").expect("the lab knows metro");
    let profile =
        Profile { name: "test".to_owned(), rate_bits_per_s: 50_000_000, rtt_us: 40_000, ..metro };
    let name = format!("{test}-{}", std::process::id());
    Spec { name, profile, seed: 1, stats_file: None }
}

fn assert_nothing_stays(name: &str) {
    for side in Side::BOTH {
        assert!(!netns::namespace_path(name, side).exists(), "{side:?} of {name} is still there");
    }
    assert!(!wan::folder(name).exists());
}

#[test]
fn round_trip_and_rates_are_those_of_the_profile() {
    if netns::is_skipped("round_trip_and_rates_are_those_of_the_profile") {
        return;
    }
    let spec = spec("rate");
    let wan = Wan::up(lab(), spec.clone()).unwrap();
    let rtt = speed::rtt(&spec.name, 20).unwrap();
    assert_eq!(rtt.lost, 0);
    // Never too early, on no machine; how late depends on who else is there.
    assert!(rtt.min_ms >= 40.0, "{rtt:?}");
    assert!(rtt.median_ms <= 60.0, "{rtt:?}");

    let time = Duration::from_secs(3);
    let tcp = speed::tcp(&spec.name, Side::A, Duration::from_secs(1), time).unwrap();
    // 1448 of 1500 bytes are payload; what waits in the queue at either end of the measurement
    // makes 5 % of play.
    assert!(tcp.mbit_per_s <= 50.0 * 1.05, "{tcp:?}");
    assert!(tcp.mbit_per_s >= 25.0, "{tcp:?}");

    let before = wan.stats().unwrap();
    let udp = speed::udp(&spec.name, Side::B, 100_000_000, time).unwrap();
    let after = wan.stats().unwrap();
    assert!(udp.mbit_per_s <= 50.0 * 1.02, "{udp:?}");
    assert!(udp.mbit_per_s >= 40.0, "{udp:?}");
    // Twice the rate came in: the queue filled, and the rest was dropped and counted.
    assert!(after.b_to_a.dropped_queue > before.b_to_a.dropped_queue);
    assert_eq!(after.b_to_a.queue_peak_bytes / 1500, spec.profile.queue_bytes() / 1500);
    let way = &after.b_to_a;
    assert_eq!(
        way.sent_packets,
        way.delivered_packets + way.dropped_queue + way.dropped_loss + way.dropped_overrun
    );
    drop(wan);
    assert_nothing_stays(&spec.name);
}

#[test]
fn a_cut_loses_everything_and_ends() {
    if netns::is_skipped("a_cut_loses_everything_and_ends") {
        return;
    }
    let spec = spec("cut");
    let wan = Wan::up(lab(), spec.clone()).unwrap();
    speed::rtt(&spec.name, 1).unwrap();
    let before = wan.stats().unwrap();
    wan.cut().unwrap();
    assert!(wan.stats().unwrap().is_cut);
    speed::rtt(&spec.name, 1).unwrap_err();
    let during = wan.stats().unwrap();
    assert_eq!(during.a_to_b.delivered_packets, before.a_to_b.delivered_packets);
    assert!(during.a_to_b.dropped_cut > before.a_to_b.dropped_cut);
    wan.restore().unwrap();
    assert_eq!(speed::rtt(&spec.name, 3).unwrap().lost, 0);
}

#[test]
fn losses_are_those_of_the_seed() {
    if netns::is_skipped("losses_are_those_of_the_seed") {
        return;
    }
    let mut spec = spec("loss");
    spec.profile.rtt_us = 1_000;
    spec.profile.loss = 0.2;
    let lost_of = |spec: &Spec| {
        let wan = Wan::up(lab(), spec.clone()).unwrap();
        wan.inside(Side::A, || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..200 {
                socket.send_to(b"x", (Side::B.address(), 9))?;
            }
            Ok(())
        })
        .unwrap();
        // The model decides when a packet comes in: wait until all have, not for a time.
        while wan.stats().unwrap().a_to_b.sent_packets < 200 {
            std::thread::yield_now();
        }
        wan.stats().unwrap().a_to_b.dropped_loss
    };
    let first = lost_of(&spec);
    assert!((15..=70).contains(&first), "{first} of 200 at 20 %");
    assert_eq!(first, lost_of(&spec));
}

#[test]
fn what_a_killed_owner_leaves_is_removed_by_down_with_its_processes() {
    if netns::is_skipped("what_a_killed_owner_leaves_is_removed_by_down_with_its_processes") {
        return;
    }
    let spec = spec("kill");
    let wan = Wan::up(lab(), spec.clone()).unwrap();
    let mut sleeper =
        wan.command(Side::B, "sleep").arg("600").stdout(Stdio::null()).spawn().unwrap();
    let owner = rustix::process::Pid::from_raw(i32::try_from(wan.owner_pid()).unwrap()).unwrap();
    rustix::process::kill_process(owner, rustix::process::Signal::KILL).unwrap();
    drop(wan);
    assert!(netns::namespace_path(&spec.name, Side::A).exists(), "nobody was left to remove it");
    wan::down(&spec.name).unwrap();
    assert_nothing_stays(&spec.name);
    assert!(!sleeper.wait().unwrap().success());
    // Down is fine where nothing is.
    wan::down(&spec.name).unwrap();
}

#[test]
fn the_command_line_brings_a_wan_up_and_down() {
    if netns::is_skipped("the_command_line_brings_a_wan_up_and_down") {
        return;
    }
    let name = spec("cli").name;
    let run = |arguments: &[&str]| {
        let mut command = Command::new(lab());
        command.arg("wan").args(&arguments[..1]).args(["--name", &name]).args(&arguments[1..]);
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(run(&["up", "--profile", "continental", "--loss", "0%"]).0);
    assert!(!run(&["up", "--profile", "metro"]).0, "the name is taken");
    let (ok, stats) = run(&["stats"]);
    assert!(ok);
    let stats: longhaul_bench::relay::Stats = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats.a_to_b.dropped_loss, 0);
    assert_eq!(wan::spec(&name).unwrap().profile.name, "continental*");
    let (ok, addresses) = run(&["exec", "b", "--", "ip", "-o", "addr"]);
    assert!(ok && addresses.contains("10.93.0.2"), "{addresses}");
    assert!(run(&["cut"]).0 && run(&["restore"]).0);
    assert!(run(&["down"]).0);
    assert_nothing_stays(&name);
    assert!(!run(&["stats"]).0);
}
