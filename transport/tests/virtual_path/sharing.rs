//! How flows share one link: sessions among each other and with TCP.
//!
//! Invariant: a share is what was delivered of a flow, headers included, over what the link can carry.

use std::time::Duration;

use bytes::Bytes;
use longhaul_bench::profile::Profile;
use longhaul_transport::{Class, Tuning};
use tokio::task::JoinSet;

use super::bbr_v1::BbrV1;
use super::cubic::Cubic;
use super::link::Line;
use super::pair::{BATCH, Pair, connect_over};
use super::tcp::Tcp;

const SECOND: Duration = Duration::from_secs(1);

/// The lab's `continental`, without its loss.
fn continental() -> Profile {
    Profile { loss: 0.0, ..Profile::named("continental").unwrap() }
}

/// Something that sends for as long as it lives.
trait Flow {
    fn delivered_bytes(&self) -> u64;
}

impl Flow for Tcp {
    fn delivered_bytes(&self) -> u64 {
        Self::delivered_bytes(self)
    }
}

/// A session with endless data.
struct Sending {
    pair: Pair,
    _tasks: JoinSet<()>,
}

impl Sending {
    async fn start(line: &Line, nth: u8) -> Self {
        let pair = connect_over(line, nth, 1, Tuning::default()).await;
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let from = pair.from.clone();
            let body = Bytes::from(vec![0x5a; BATCH]);
            tasks.spawn(async move {
                while from.send_batch(Class::Pages, b"", vec![body.clone()]).await.is_ok() {}
            });
        }
        let to = pair.to.clone();
        tasks.spawn(async move { while to.recv_batch().await.is_ok() {} });
        Self { pair, _tasks: tasks }
    }

    /// As [`start`](Self::start), in the background.
    async fn start_behind(line: &Line, nth: u8) -> Self {
        let sending = Self::start(line, nth).await;
        sending.pair.from.set_background(true);
        sending
    }
}

impl Flow for Sending {
    fn delivered_bytes(&self) -> u64 {
        self.pair.near.sent().delivered_bytes
    }
}

/// The share of the link that each flow has in the coming `span`.
async fn shares<const N: usize>(
    profile: &Profile,
    flows: [&dyn Flow; N],
    span: Duration,
) -> [f64; N] {
    let before = flows.map(Flow::delivered_bytes);
    tokio::time::sleep(span).await;
    let carried = profile.carried_bytes(Duration::ZERO, span);
    let after = flows.map(Flow::delivered_bytes);
    std::array::from_fn(|flow| (after[flow] - before[flow]) as f64 / carried)
}

/// Jain's index of fairness: 1 if all are equal.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    sum * sum / (shares.len() as f64 * shares.iter().map(|share| share * share).sum::<f64>())
}

/// Whom a session meets on its way.
#[derive(Debug, Clone, Copy)]
enum Rival {
    Cubic,
    Bbr,
}

impl Rival {
    const ALL: [Self; 2] = [Self::Cubic, Self::Bbr];

    fn start(self, line: &Line) -> Tcp {
        match self {
            Self::Cubic => Tcp::start(line, Cubic::new()),
            Self::Bbr => Tcp::start(line, BbrV1::new()),
        }
    }

    /// What it gets alone, from its start on.
    async fn alone(self, span: Duration) -> f64 {
        let line = Line::new(&continental(), 1);
        let [share] = shares(&continental(), [&self.start(&line)], span).await;
        share
    }
}

/// The rivals are no weaker than the real ones: alone they fill the link.
#[tokio::test(start_paused = true)]
async fn tcp_alone_fills_the_link() {
    for rival in Rival::ALL {
        let line = Line::new(&continental(), 1);
        let tcp = rival.start(&line);
        let [first] = shares(&continental(), [&tcp], 5 * SECOND).await;
        let [then] = shares(&continental(), [&tcp], 55 * SECOND).await;
        println!("{rival:?} alone: {first:.3} in its first 5 s, then {then:.3}");
        assert!(first > 0.75 && then > 0.9, "{rival:?}: {first}, {then}");
    }
}

/// From the tenth round trip of a session on it has the link, on a path that nobody has measured.
#[tokio::test(start_paused = true)]
async fn a_start_takes_ten_round_trips() {
    let profile = Profile::named("continental").unwrap();
    let line = Line::new(&profile, 1);
    let session = Sending::start(&line, 0).await;
    tokio::time::sleep(9 * profile.rtt()).await;
    let [share] = shares(&profile, [&session], 10 * profile.rtt()).await;
    println!("from the tenth round trip to the twentieth: {share:.3}");
    assert!(share >= 0.9, "{share}");
}

/// Two sessions, the second some time after the first: fair from ten seconds after that on. When each of
/// them probes is a matter of luck, so there are many times.
#[tokio::test(start_paused = true)]
async fn two_sessions_share_fairly() {
    let apart = [0, 700, 2_000, 3_500, 5_000, 6_300, 8_000, 11_000].map(Duration::from_millis);
    let mut sum_of_jain = 0.0;
    for later in apart {
        let line = Line::new(&continental(), 1);
        let first = Sending::start(&line, 0).await;
        tokio::time::sleep(later).await;
        let second = Sending::start(&line, 1).await;
        tokio::time::sleep(10 * SECOND).await;
        let both = shares(&continental(), [&first, &second], 30 * SECOND).await;
        let (jain, sum) = (jain(&both), both[0] + both[1]);
        println!("two sessions, {later:?} apart: {both:.3?}, Jain {jain:.3}, together {sum:.3}");
        assert!(jain >= 0.85 && sum >= 0.95, "{later:?}: {both:?}");
        sum_of_jain += jain;
    }
    let mean = sum_of_jain / apart.len() as f64;
    println!("Jain's index in the mean: {mean:.3}");
    assert!(mean >= 0.97, "{mean}");
}

/// Beside TCP, whoever comes first. A session that comes to a path which TCP has filled for long starts small
/// and is still on its way up after a minute: BBR (version 1) gives nothing back that it has once seen,
/// and CUBIC's losses take from both.
#[tokio::test(start_paused = true)]
async fn a_session_leaves_and_takes_a_share_beside_tcp() {
    for rival in Rival::ALL {
        for [before, after] in [[0, 5], [5, 0], [0, 0], [20, 0]] {
            let line = Line::new(&continental(), 1);
            let tcp_first = (before > 0).then(|| rival.start(&line));
            tokio::time::sleep(before * SECOND).await;
            let session = Sending::start(&line, 0).await;
            tokio::time::sleep(after * SECOND).await;
            let tcp = tcp_first.unwrap_or_else(|| rival.start(&line));
            tokio::time::sleep(SECOND).await;
            let both = shares(&continental(), [&session, &tcp], 54 * SECOND).await;
            println!("a session {after} s before, {before} s after {rival:?}: {both:.3?}");
            let least = if before > 5 { 0.12 } else { 0.3 };
            assert!((least..=0.7).contains(&both[0]), "{rival:?}, {before}, {after}: {both:?}");
        }
    }
}

/// In the background TCP keeps what it has alone; when it stops, the link is used again soon.
#[tokio::test(start_paused = true)]
async fn in_the_background_a_session_yields_and_comes_back() {
    for rival in Rival::ALL {
        let alone = rival.alone(25 * SECOND).await;
        for late in [0, 5] {
            let line = Line::new(&continental(), 1);
            let tcp_first = (late > 0).then(|| rival.start(&line));
            tokio::time::sleep(late * SECOND).await;
            let session = Sending::start_behind(&line, 0).await;
            tokio::time::sleep((5 - late) * SECOND).await;
            let tcp = tcp_first.unwrap_or_else(|| rival.start(&line));
            let [kept] = shares(&continental(), [&tcp], 25 * SECOND).await;
            drop(tcp);
            tokio::time::sleep(3 * SECOND).await;
            let [back] = shares(&continental(), [&session], 3 * SECOND).await;
            println!(
                "in the background, {late} s after {rival:?}: it keeps {kept:.3} of {alone:.3}; \
                 back at {back:.3}"
            );
            assert!(kept >= 0.9 * alone, "{rival:?}, {late}: {kept} of {alone}");
            assert!(back >= 0.95, "{rival:?}, {late}: {back}");
        }
    }
}

/// Alone the background costs nothing, and it is left at once.
#[tokio::test(start_paused = true)]
async fn alone_the_background_is_as_fast_and_can_be_left() {
    let profile = Profile::named("continental").unwrap();
    let [mut foreground, mut background] = [0.0; 2];
    for (behind, share) in [(false, &mut foreground), (true, &mut background)] {
        let line = Line::new(&profile, 1);
        let session = Sending::start(&line, 0).await;
        session.pair.from.set_background(behind);
        tokio::time::sleep(3 * SECOND).await;
        [*share] = shares(&profile, [&session], 15 * SECOND).await;
    }
    println!("alone, with loss: {foreground:.3}; in the background {background:.3}");
    assert!(background >= foreground - 0.01, "{background} < {foreground}");

    let line = Line::new(&continental(), 1);
    let session = Sending::start_behind(&line, 0).await;
    let tcp = Rival::Cubic.start(&line);
    tokio::time::sleep(5 * SECOND).await;
    session.pair.from.set_background(false);
    let [back] = shares(&continental(), [&session], 15 * SECOND).await;
    println!("out of the background beside CUBIC: {back:.3}");
    assert!(back >= 0.15, "{back}");
    drop(tcp);
}
