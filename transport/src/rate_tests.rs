//! Tests of the rate caps: the pure tree under proptest, the waiting shell on a paused clock.

use proptest::prelude::*;

use super::*;

fn rate(text: &str) -> Option<BitRate> {
    Some(text.parse().unwrap())
}

fn tree_with_job() -> (Tree, u64, Instant) {
    let now = Instant::now();
    let mut tree = Tree::new(now);
    let job = tree.add_job(now);
    (tree, job, now)
}

#[test]
fn no_cap_no_wait() {
    let (mut tree, job, now) = tree_with_job();
    for _ in 0..1000 {
        assert_eq!(tree.request(now, job, Class::Seed, 1 << 30), Verdict::Pass);
    }
    assert_eq!(tree.slice(job, Class::Seed), SLICE_MAX);
}

#[test]
fn every_level_holds() {
    for level in 0..3 {
        let (mut tree, id, now) = tree_with_job();
        match level {
            0 => tree.agent.set_rate(rate("8M"), now),
            1 => tree.jobs.get_mut(&id).unwrap().cap.set_rate(rate("8M"), now),
            _ => tree.jobs.get_mut(&id).unwrap().classes[Class::Pages.index()]
                .set_rate(rate("8M"), now),
        }
        assert_eq!(tree.request(now, id, Class::Pages, 1_000_000), Verdict::Pass);
        let second = Duration::from_secs(1);
        assert_eq!(tree.request(now, id, Class::Pages, 1), Verdict::Wait(second));
        assert_eq!(tree.request(now + second, id, Class::Pages, 1), Verdict::Pass);
        let other = tree.request(now, id, Class::Seed, 1);
        assert_eq!(other == Verdict::Pass, level == 2, "a class cap binds its class alone");
    }
}

#[test]
fn hand_over_never_waits_and_is_charged() {
    let (mut tree, job, now) = tree_with_job();
    tree.agent.set_rate(rate("8M"), now);
    assert_eq!(tree.request(now, job, Class::Seed, 1_000_000), Verdict::Pass);
    assert_eq!(tree.request(now, job, Class::HandOver, 1_000_000), Verdict::Pass);
    assert_eq!(tree.request(now, job, Class::Seed, 1), Verdict::Wait(Duration::from_secs(2)));
}

#[test]
fn the_more_urgent_goes_first_unless_its_own_cap_binds() {
    let (mut tree, job, now) = tree_with_job();
    tree.agent.set_rate(rate("8M"), now);
    tree.jobs.get_mut(&job).unwrap().waiting[Class::Pages.index()] = 1;
    assert_eq!(tree.request(now, job, Class::Seed, 1), Verdict::Yield);
    assert_eq!(tree.request(now, job, Class::Pages, 1), Verdict::Pass);

    let pages = &mut tree.jobs.get_mut(&job).unwrap().classes[Class::Pages.index()];
    pages.set_rate(rate("1M"), now);
    pages.take(1_000_000);
    let later = now + Duration::from_secs(1);
    assert_eq!(tree.request(later, job, Class::Seed, 1), Verdict::Pass);
}

#[test]
fn jobs_take_turns_and_idleness_is_not_saved_up() {
    let (mut tree, first, now) = tree_with_job();
    tree.agent.set_rate(rate("8M"), now);
    for nth in 0..100 {
        tree.request(now + Duration::from_secs(nth), first, Class::Pages, 100_000);
    }
    let second = tree.add_job(now);
    for id in [first, second] {
        tree.jobs.get_mut(&id).unwrap().waiting[Class::Pages.index()] = 1;
    }
    let mut now = now + Duration::from_secs(100);
    let mut passed = BTreeMap::new();
    for _ in 0..10 {
        // The first always asks first.
        for id in [first, second] {
            if tree.request(now, id, Class::Pages, 100_000) == Verdict::Pass {
                *passed.entry(id).or_insert(0) += 1;
            }
        }
        now += Duration::from_millis(100);
    }
    assert_eq!((passed[&first], passed[&second]), (5, 5));
}

#[test]
fn what_is_owed_is_repaid_but_not_for_ever() {
    let (mut tree, job, now) = tree_with_job();
    tree.owe(now, job, 1 << 40);
    assert_eq!(tree.request(now, job, Class::Seed, 1), Verdict::Pass, "nothing is capped");
    tree.agent.set_rate(rate("8M"), now);
    tree.owe(now, job, 1_000);
    assert_eq!(tree.request(now, job, Class::Seed, 1), Verdict::Wait(Duration::from_millis(1)));
    tree.owe(now, job, 1 << 40);
    let Verdict::Wait(wait) = tree.request(now, job, Class::Seed, 1) else { panic!("it passed") };
    assert_eq!(wait, OWED_MAX + Duration::from_millis(1));
}

#[test]
fn the_socket_keeps_the_caps_of_agent_and_job() {
    let (mut tree, id, now) = tree_with_job();
    tree.left(id, 1 << 40);
    assert_eq!(tree.wait_to_leave(now, id), Duration::ZERO, "nothing is capped");
    tree.agent.set_rate(rate("8M"), now);
    tree.jobs.get_mut(&id).unwrap().cap.set_rate(rate("4M"), now);
    tree.left(id, 1_000);
    assert_eq!(tree.wait_to_leave(now, id), Duration::from_millis(2));
    let other = tree.add_job(now);
    assert_eq!(
        tree.wait_to_leave(now, other),
        Duration::from_millis(1),
        "the agent's cap is shared"
    );
    assert_eq!(tree.lowest(id), rate("4M"));
    assert_eq!(tree.lowest(other), rate("8M"));
}

proptest! {
    /// Whatever senders ask for and whenever they ask, no bucket passes more than it promises.
    #[test]
    fn no_more_passes_than_the_cap(
        bits in 10_000u64..10_000_000_000,
        asks in prop::collection::vec((0u64..200_000_000, 1u64..SLICE_MAX, 0usize..4), 1..200),
    ) {
        let (mut tree, job, start) = tree_with_job();
        let cap = BitRate::from_bits_per_second(bits);
        tree.agent.set_rate(Some(cap), start);
        let (mut now, mut passed, mut largest) = (start, 0u64, 0u64);
        for (nanos, bytes, class) in asks {
            now += Duration::from_nanos(nanos);
            largest = largest.max(bytes);
            if tree.request(now, job, Class::ALL[class], bytes) == Verdict::Pass {
                passed += bytes;
            }
            let allowed = cap.bytes_in(now - start + BURST) + largest + 1;
            prop_assert!(passed <= allowed, "{passed} > {allowed}");
        }
    }

    /// A sender that asks again when it was told to always gets through, and loses no time.
    #[test]
    fn the_cap_is_reached(bits in 10_000u64..10_000_000_000, slices in 1u64..100) {
        let (mut tree, job, start) = tree_with_job();
        let cap = BitRate::from_bits_per_second(bits);
        tree.agent.set_rate(Some(cap), start);
        let (mut now, mut sent) = (start, 0u64);
        while sent < slices * SLICE_MIN {
            match tree.request(now, job, Class::Blocks, SLICE_MIN) {
                Verdict::Pass => sent += SLICE_MIN,
                Verdict::Wait(time) => now += time,
                Verdict::Yield => prop_assert!(false, "nobody else is there"),
            }
        }
        prop_assert!(now - start <= cap.time_for(sent));
    }
}

#[tokio::test(start_paused = true)]
async fn a_changed_rate_holds_at_once() {
    let limiter = RateLimiter::new();
    let job = limiter.job();
    limiter.set_agent(rate("8k"));
    job.acquire(Class::Seed, 1_000_000).await;
    let began = tokio::time::Instant::now();
    let blocked = tokio::spawn({
        let job = job.clone();
        async move { job.acquire(Class::Seed, 1).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!blocked.is_finished(), "1000 s at the old rate");
    limiter.set_agent(rate("8G"));
    blocked.await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(1100), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn senders_of_all_classes_share_one_cap() {
    let limiter = RateLimiter::new();
    limiter.set_agent(rate("80M"));
    let began = tokio::time::Instant::now();
    let mut senders = tokio::task::JoinSet::new();
    for class in Class::ALL {
        let job = limiter.job();
        senders.spawn(async move {
            for _ in 0..20 {
                job.acquire(class, 100_000).await;
            }
            (class, began.elapsed())
        });
    }
    let ends: BTreeMap<Class, Duration> = senders.join_all().await.into_iter().collect();
    // 10 MB at 10 MB/s; timers have a grain of a millisecond.
    let last = ends[&Class::Seed];
    assert!((900..1200).contains(&last.as_millis()), "{last:?}");
    assert!(ends[&Class::DeviceState] < ends[&Class::Pages], "{ends:?}");
    assert!(ends[&Class::Pages] < ends[&Class::Seed], "{ends:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_sender_gives_up_its_place() {
    let limiter = RateLimiter::new();
    limiter.set_agent(rate("8M"));
    let job = limiter.job();
    job.acquire(Class::Pages, 1_000_000).await;
    let gone = tokio::time::timeout(Duration::from_millis(1), job.acquire(Class::Pages, 1)).await;
    assert!(gone.is_err());
    tokio::time::timeout(Duration::from_secs(2), job.acquire(Class::Seed, 1)).await.unwrap();
}
