//! Rate caps on the wire: every byte of every packet over a long and lossy path, and who may overtake.
//!
//! Invariant: what is measured is what the link was given, IP and UDP headers included.

use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{BitRate, Class, JobRate, RateLimiter, Session, Tuning};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::pair::{BATCH, Pair, connect, path};

const SECOND: Duration = Duration::from_secs(1);
/// Time in which a change has to hold.
const CHANGE: Duration = Duration::from_millis(500);
/// Of a cap, what may leave in any second at most and has to be used at least.
const MOST: f64 = 1.02;
const USED: f64 = 0.98;

fn rate(text: &str) -> Option<BitRate> {
    Some(text.parse().unwrap())
}

/// What has left over a number of links.
struct Wire(Vec<(Instant, u64)>);

impl Wire {
    fn of(pairs: &[&Pair]) -> Self {
        let mut all: Vec<_> = pairs.iter().flat_map(|pair| pair.near.departures()).collect();
        all.sort();
        Self(all)
    }

    fn between(&self, from: Instant, until: Instant) -> &[(Instant, u64)] {
        let place = |at: Instant| self.0.partition_point(|&(left, _)| left < at);
        &self.0[place(from)..place(until)]
    }

    /// Bits a second.
    fn mean(&self, from: Instant, until: Instant) -> f64 {
        let bytes: u64 = self.between(from, until).iter().map(|&(_, bytes)| bytes).sum();
        bytes as f64 * 8.0 / (until - from).as_secs_f64()
    }

    /// Most bits a second in any span of that length, wherever it begins.
    fn most(&self, span: Duration, from: Instant, until: Instant) -> f64 {
        let packets = self.between(from, until);
        let (mut first, mut sum, mut most) = (0, 0, 0);
        for &(left, bytes) in packets {
            sum += bytes;
            while packets[first].0 + span <= left {
                sum -= packets[first].1;
                first += 1;
            }
            most = most.max(sum);
        }
        most as f64 * 8.0 / span.as_secs_f64()
    }

    /// Holds all that left to a cap: no second has too much, all of them together enough.
    fn check(&self, what: &str, cap: &str, from: Instant, until: Instant) {
        let bits = rate(cap).unwrap().bits_per_second() as f64;
        let most = self.most(SECOND, from, until) / bits;
        let used = self.mean(from, until) / bits;
        println!("{what}: cap {cap}, {most:.4} of it in a second at most, {used:.4} on average");
        assert!(most <= MOST, "{what}: {most}");
        assert!(used >= USED, "{what}: {used}");
    }
}

/// Sends for as long as it lives, some batches at a time, and takes them at the other end.
fn keep_busy(from: &Session, to: &Session, classes: &[Class], at_a_time: usize) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let body = Bytes::from(vec![0x5a; BATCH]);
    for &class in classes {
        for _ in 0..at_a_time {
            let (from, body) = (from.clone(), body.clone());
            tasks.spawn(async move {
                while from.send_batch(class, b"", vec![body.clone()]).await.is_ok() {}
            });
        }
    }
    let to = to.clone();
    tasks.spawn(async move { while to.recv_batch().await.is_ok() {} });
    tasks
}

async fn capped(cap: &str) -> (Pair, RateLimiter, JobRate, JoinSet<()>) {
    let pair = connect(&path(200, 80, 1_000), 1, Tuning::default()).await;
    let agent = RateLimiter::new();
    let job = agent.job();
    job.set_job(rate(cap));
    pair.from.set_rate(job.clone());
    let busy = keep_busy(&pair.from, &pair.to, &[Class::Pages], 4);
    (pair, agent, job, busy)
}

#[tokio::test(start_paused = true)]
async fn a_cap_holds_in_every_second_and_is_used() {
    for cap in ["2M", "20M", "150M"] {
        let began = Instant::now();
        let (pair, _agent, _job, _busy) = capped(cap).await;
        sleep(20 * SECOND).await;
        let wire = Wire::of(&[&pair]);
        let most = wire.most(SECOND, began, Instant::now());
        let bits = rate(cap).unwrap().bits_per_second() as f64;
        assert!(most <= MOST * bits, "from the first packet on: {most}");
        wire.check("steady", cap, began + SECOND, Instant::now());
    }
}

#[tokio::test(start_paused = true)]
async fn a_changed_cap_holds_within_half_a_second() {
    let (pair, _agent, job, _busy) = capped("20M").await;
    sleep(5 * SECOND).await;
    for cap in ["50M", "10M", "20M", "2M", "20M"] {
        let changed = Instant::now();
        job.set_job(rate(cap));
        sleep(10 * SECOND).await;
        let wire = Wire::of(&[&pair]);
        wire.check("changed", cap, changed + CHANGE, Instant::now());

        // How long it took, for people.
        let bits = rate(cap).unwrap().bits_per_second() as f64;
        let step = Duration::from_millis(10);
        let near = |nth: u32| {
            let at = changed + nth * step;
            (0.85..1.15).contains(&(wire.mean(at, at + 20 * step) / bits))
        };
        let held = (0..100).find(|nth| (*nth..*nth + 50).all(near)).map(|nth| nth * step);
        println!("changed to {cap}: within 15 % in every 200 ms from {held:?} on");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_link_that_is_whole_again_gets_no_burst() {
    let (pair, _agent, _job, _busy) = capped("20M").await;
    sleep(5 * SECOND).await;
    let cut = Instant::now();
    pair.near.cut();
    sleep(3 * SECOND).await;
    pair.near.restore();
    let whole = Instant::now();
    sleep(10 * SECOND).await;
    let wire = Wire::of(&[&pair]);
    let most = wire.most(SECOND, cut - SECOND, Instant::now());
    println!("over a cut: {:.4} of the cap in a second at most", most / 20e6);
    assert!(most <= MOST * 20e6, "{most}");
    wire.check("after a cut", "20M", whole + 3 * SECOND, Instant::now());
}

#[tokio::test(start_paused = true)]
async fn a_session_that_goes_on_over_another_connection_keeps_its_caps() {
    let (pair, _agent, job, _busy) = capped("20M").await;
    for session in [&pair.from, &pair.to] {
        session.set_patience(300 * SECOND);
    }
    sleep(5 * SECOND).await;
    let cut = Instant::now();
    pair.near.cut();
    sleep(60 * SECOND).await;
    pair.near.restore();
    sleep(5 * SECOND).await;
    let whole = Instant::now();
    sleep(10 * SECOND).await;
    assert_eq!(pair.from.stats().reconnects, 1);
    let most = Wire::of(&[&pair]).most(SECOND, cut - SECOND, Instant::now());
    println!("over a reconnect: {:.4} of the cap in a second at most", most / 20e6);
    assert!(most <= MOST * 20e6, "{most}");
    Wire::of(&[&pair]).check("after a reconnect", "20M", whole, Instant::now());
    job.set_job(rate("50M"));
    let changed = Instant::now();
    sleep(10 * SECOND).await;
    Wire::of(&[&pair]).check("changed", "50M", changed + CHANGE, Instant::now());
}

#[tokio::test(start_paused = true)]
async fn the_agents_cap_holds_over_all_its_sessions() {
    let agent = RateLimiter::new();
    agent.set_agent(rate("20M"));
    let profile = path(200, 80, 1_000);
    let pairs = [
        connect(&profile, 1, Tuning::default()).await,
        connect(&path(50, 20, 0), 2, Tuning::default()).await,
    ];
    let (from, to) = pairs[0].another().await;
    let mut busy = Vec::new();
    let began = Instant::now();
    let all = [(&pairs[0].from, &pairs[0].to), (&pairs[1].from, &pairs[1].to), (&from, &to)];
    for (from, to) in all {
        from.set_rate(agent.job());
        busy.push(keep_busy(from, to, &[Class::Pages], 2));
    }
    sleep(20 * SECOND).await;
    let wire = Wire::of(&[&pairs[0], &pairs[1]]);
    wire.check("three sessions", "20M", began + SECOND, Instant::now());
    for (from, _) in all {
        let sent = from.stats().wire_bytes_sent as f64 * 8.0 / 20.0;
        println!("  of which {:.1} Mbit/s", sent / 1e6);
        assert!((6e6..7.4e6).contains(&sent), "they do not share: {sent}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_class_cap_holds_beside_classes_that_have_none() {
    let pair = connect(&path(200, 80, 1_000), 1, Tuning::default()).await;
    let job = RateLimiter::new().job();
    job.set_job(rate("50M"));
    job.set_class(Class::Pages, rate("20M"));
    pair.from.set_rate(job.clone());
    let _busy = keep_busy(&pair.from, &pair.to, &[Class::Pages, Class::Seed], 4);
    let began = Instant::now();
    sleep(20 * SECOND).await;
    Wire::of(&[&pair]).check("all classes", "50M", began + SECOND, Instant::now());
    let stats = pair.from.stats();
    let [seed, pages] = [Class::Seed, Class::Pages].map(|class| stats.class(class).sent as f64);
    let [seed, pages] = [seed, pages].map(|bytes| bytes * 8.0 / began.elapsed().as_secs_f64());
    println!("pages {:.2} Mbit/s, seed {:.2} Mbit/s", pages / 1e6, seed / 1e6);
    assert!((18.5e6..20.4e6).contains(&pages), "{pages}");
    assert!((26e6..30e6).contains(&seed), "{seed}");
}

/// 1 KiB of hand-over behind a full queue of pages: on its way at once, whatever is capped.
#[tokio::test(start_paused = true)]
async fn a_hand_over_does_not_wait_behind_capped_pages() {
    let rtt = Duration::from_millis(80);
    for (agent_cap, job_cap, class_cap) in [
        (None, Some("20M"), None),
        (None, None, Some("20M")),
        (None, Some("20M"), Some("5M")),
        (None, Some("1M"), None),
        (Some("20M"), None, None),
        (Some("64k"), None, Some("64k")),
    ] {
        let pair = connect(&path(200, 80, 0), 1, Tuning::default()).await;
        let agent = RateLimiter::new();
        agent.set_agent(agent_cap.and_then(rate));
        // Another job that takes what it gets of the agent's cap.
        let (other, its_peer) = pair.another().await;
        other.set_rate(agent.job());
        let busy = agent_cap.map(|_| keep_busy(&other, &its_peer, &[Class::Pages], 4));
        let job = agent.job();
        job.set_job(job_cap.and_then(rate));
        for class in Class::ALL {
            job.set_class(class, class_cap.and_then(rate));
        }
        pair.from.set_rate(job.clone());
        let mut pages = JoinSet::new();
        for _ in 0..48 {
            let from = pair.from.clone();
            pages.spawn(async move {
                let body = Bytes::from(vec![0; BATCH]);
                while from.send_batch(Class::Pages, b"", vec![body.clone()]).await.is_ok() {}
            });
        }
        sleep(2 * SECOND).await;
        let mut latest = Duration::ZERO;
        for nth in 0..50u32 {
            // At all places between two packets.
            sleep(Duration::from_micros(50_000 + u64::from(nth) * 137)).await;
            let sent = Instant::now();
            let message = vec![Bytes::from(vec![1; 1024])];
            pair.from.send_batch(Class::HandOver, b"", message).await.unwrap();
            while pair.to.recv_batch().await.unwrap().class != Class::HandOver {}
            latest = latest.max(sent.elapsed());
        }
        println!("hand-over under {agent_cap:?}, job {job_cap:?}, class {class_cap:?}: {latest:?}");
        assert!(latest <= rtt / 2 + Duration::from_millis(20), "{latest:?}");
        drop((pages, busy));
    }
}
