//! One direction of a WAN as a pure model: rate, tail-drop queue, delay, jitter, loss, cuts.
//!
//! Invariant: packets that are delivered are delivered in the order in which they were offered, no
//! earlier than the profile's delay after they were offered, and never faster than its rate.
//!
//! The model reads no clock and keeps no packets: it says of each one when it arrives or why it
//! does not. Equal seeds and equal offers give equal answers.
//!
//! ```text
//!  offer -> [cut?] -> [queue, drops its tail] -> bottleneck at `rate` -> [lost?] -> delay + jitter
//! ```
//! Loss lies behind the bottleneck: a lost packet has used its share of the rate, as on a real path.

use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use crate::profile::Profile;

/// What becomes of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It arrives at this moment.
    Deliver(Duration),
    /// It does not arrive.
    Drop(Reason),
}

/// Why a packet does not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The queue before the bottleneck was full.
    Queue,
    /// It was lost on its way.
    Loss,
    /// The link is cut.
    Cut,
}

/// One direction of a link. Moments are durations since any fixed start, and never go back.
#[derive(Debug)]
pub struct Link {
    profile: Profile,
    queue_bytes: u64,
    random: Xoshiro256PlusPlus,
    /// When the bottleneck has sent everything that was accepted so far.
    free_at_ns: u64,
    /// Parts of a nanosecond by which `free_at_ns` is too early, in 1/rate.
    remainder: u64,
    /// The rate that `remainder` is of.
    rate: u64,
    /// The last moment of delivery: jitter must not reorder.
    last_arrival_ns: u64,
    in_burst: bool,
    is_cut: bool,
    queue_peak_bytes: u64,
    /// How long the packet that was accepted last waits for those before it.
    waited_ns: u64,
}

const NS_PER_S: u64 = 1_000_000_000;

impl Link {
    /// An idle link; `seed` decides its losses and jitter.
    pub fn new(profile: &Profile, seed: u64) -> Self {
        Self {
            queue_bytes: profile.queue_bytes(),
            profile: profile.clone(),
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            free_at_ns: 0,
            remainder: 0,
            rate: profile.rate_at(0),
            last_arrival_ns: 0,
            in_burst: false,
            is_cut: false,
            queue_peak_bytes: 0,
            waited_ns: 0,
        }
    }

    /// Offers a packet of `len` bytes that reaches the link now.
    pub fn offer(&mut self, now: Duration, len: u32) -> Verdict {
        self.offer_noticed(now, now, len)
    }

    /// Offers a packet that reached the link at `reached` but was noticed only `now`.
    ///
    /// The bottleneck gets the time between them, so that a host that was busy for a moment does
    /// not waste the link's rate; the delay is counted from `now`, so that no packet is too early.
    pub fn offer_noticed(&mut self, reached: Duration, now: Duration, len: u32) -> Verdict {
        if self.is_cut {
            return Verdict::Drop(Reason::Cut);
        }
        let (reached_ns, now_ns) = (nanos(reached), nanos(now));
        let waiting = self.waiting_bytes(reached_ns) + u64::from(len);
        if waiting > self.queue_bytes {
            return Verdict::Drop(Reason::Queue);
        }
        self.queue_peak_bytes = self.queue_peak_bytes.max(waiting);
        self.waited_ns = self.free_at_ns.saturating_sub(reached_ns);
        self.transmit(reached_ns, len);
        if self.is_lost() {
            return Verdict::Drop(Reason::Loss);
        }
        let jitter_ns = match self.profile.jitter_us {
            0 => 0,
            us => self.random.random_range(0..=us * 1_000),
        };
        let arrival_ns = self.free_at_ns.max(now_ns) + nanos(self.profile.one_way()) + jitter_ns;
        self.last_arrival_ns = self.last_arrival_ns.max(arrival_ns);
        Verdict::Deliver(Duration::from_nanos(self.last_arrival_ns))
    }

    /// Loses everything from now on. What was under way is lost too: its keeper drops it.
    pub fn cut(&mut self) {
        self.is_cut = true;
    }

    /// The link is whole again.
    pub fn restore(&mut self) {
        self.is_cut = false;
    }

    /// Gives it another rate from now on.
    pub fn set_rate(&mut self, bits_per_s: u64) {
        self.profile.rate_bits_per_s = bits_per_s;
        self.profile.trace = None;
    }

    /// The most bytes that ever waited before the bottleneck.
    pub fn queue_peak_bytes(&self) -> u64 {
        self.queue_peak_bytes
    }

    /// How long the packet that was accepted last waits before the bottleneck.
    pub fn last_wait(&self) -> Duration {
        Duration::from_nanos(self.waited_ns)
    }

    /// Accounts for the bottleneck's time for one packet, exactly: fractions of a nanosecond add
    /// up to percents at high rates.
    fn transmit(&mut self, reached_ns: u64, len: u32) {
        if reached_ns > self.free_at_ns {
            self.free_at_ns = reached_ns;
            self.remainder = 0;
        }
        let rate = self.profile.rate_at(self.free_at_ns);
        if self.rate != rate {
            (self.rate, self.remainder) = (rate, 0);
        }
        // u32 bytes in bits times 1e9 needs 65 bits at worst; packets are 64 KiB at most.
        let work = u128::from(len) * 8 * u128::from(NS_PER_S) + u128::from(self.remainder);
        let (ns, remainder) = (work / u128::from(rate), work % u128::from(rate));
        self.free_at_ns += u64::try_from(ns).unwrap_or(u64::MAX >> 1);
        self.remainder = u64::try_from(remainder).unwrap_or(0);
    }

    /// Bytes before the bottleneck, the packet that is being sent included.
    fn waiting_bytes(&self, now_ns: u64) -> u64 {
        let ahead_ns = u128::from(self.free_at_ns.saturating_sub(now_ns));
        // Of a rate that changes while they wait this is the present one's idea of them.
        let rate = self.profile.rate_at(now_ns);
        let bytes = ahead_ns * u128::from(rate) / (8 * u128::from(NS_PER_S));
        u64::try_from(bytes).unwrap_or(u64::MAX >> 1)
    }

    fn is_lost(&mut self) -> bool {
        let mut lost = self.profile.loss > 0.0 && self.random.random_bool(self.profile.loss);
        if let Some(burst) = self.profile.burst {
            let turn = if self.in_burst { burst.stop } else { burst.start };
            self.in_burst ^= self.random.random_bool(turn);
            lost |= self.in_burst && self.random.random_bool(burst.loss);
        }
        lost
    }
}

/// Nanoseconds of a moment; 584 years fit.
fn nanos(moment: Duration) -> u64 {
    u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX >> 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::profile::{Burst, Trace};

    const MS: Duration = Duration::from_millis(1);

    fn profile(rate_mbit: u64, rtt_ms: u64) -> Profile {
        Profile {
            rate_bits_per_s: rate_mbit * 1_000_000,
            rtt_us: rtt_ms * 1000,
            ..Profile::named("metro").unwrap()
        }
    }

    fn arrival(verdict: Verdict) -> Duration {
        match verdict {
            Verdict::Deliver(at) => at,
            Verdict::Drop(reason) => panic!("dropped: {reason:?}"),
        }
    }

    #[test]
    fn a_lone_packet_takes_its_transmission_and_half_the_round_trip() {
        let mut link = Link::new(&profile(100, 80), 1);
        // 1250 bytes at 100 Mbit/s are 100 us.
        let at = arrival(link.offer(MS * 7, 1250));
        assert_eq!(at, MS * 47 + Duration::from_micros(100));
    }

    #[test]
    fn a_second_of_backlog_is_a_second_of_rate() {
        let mut link = Link::new(&Profile { queue_bytes: Some(1 << 28), ..profile(1000, 5) }, 1);
        let mut last = Duration::ZERO;
        // 83,334 packets of 1500 bytes: a second at 1 Gbit/s, to the nanosecond although one
        // packet takes a whole number of them only by chance.
        for _ in 0..83_333 {
            last = arrival(link.offer(Duration::ZERO, 1500));
        }
        assert_eq!(last, Duration::from_nanos(83_333 * 12_000 + 2_500_000));
        let mut odd = Link::new(&Profile { queue_bytes: Some(1 << 28), ..profile(700, 0) }, 1);
        for _ in 0..70_000 {
            last = arrival(odd.offer(Duration::ZERO, 1000));
        }
        assert_eq!(last, Duration::from_millis(800));
    }

    #[test]
    fn the_tail_is_dropped_when_the_queue_is_full_and_fits_again_later() {
        let mut link = Link::new(&Profile { queue_bytes: Some(15_000), ..profile(100, 10) }, 1);
        for _ in 0..10 {
            arrival(link.offer(Duration::ZERO, 1500));
        }
        assert_eq!(link.offer(Duration::ZERO, 1500), Verdict::Drop(Reason::Queue));
        assert_eq!(link.queue_peak_bytes(), 15_000);
        // Nine packets before it, 120 us each.
        assert_eq!(link.last_wait(), Duration::from_micros(9 * 120));
        // One packet leaves after 120 us, and one fits again.
        let later = Duration::from_micros(120);
        arrival(link.offer(later, 1500));
        assert_eq!(link.offer(later, 1500), Verdict::Drop(Reason::Queue));
    }

    #[test]
    fn a_cut_link_drops_and_a_restored_one_delivers() {
        let mut link = Link::new(&profile(100, 10), 1);
        link.cut();
        assert_eq!(link.offer(MS, 100), Verdict::Drop(Reason::Cut));
        link.restore();
        arrival(link.offer(MS * 2, 100));
    }

    #[test]
    fn random_loss_is_as_frequent_as_asked_and_replays_from_its_seed() {
        let lossy = Profile { loss: 0.01, ..profile(1000, 5) };
        let losses = |seed| -> Vec<u32> {
            let mut link = Link::new(&lossy, seed);
            (0..100_000)
                .filter(|i| link.offer(MS * *i, 1500) == Verdict::Drop(Reason::Loss))
                .collect()
        };
        let first = losses(7);
        // 1000 expected, standard deviation 31.5: five of them.
        assert!((840..=1160).contains(&first.len()), "{}", first.len());
        assert_eq!(first, losses(7));
        assert_ne!(first, losses(8));
    }

    #[test]
    fn a_rate_that_changes_is_kept() {
        let trace = Trace { step_us: 1_000_000, rates_bits_per_s: vec![8_000_000, 80_000_000] };
        let queue_bytes = Some(1 << 26);
        let mut link = Link::new(&Profile { trace: Some(trace), queue_bytes, ..profile(1, 0) }, 1);
        // A second of the first rate, one of the second, and the first again.
        let mut last = Duration::ZERO;
        for _ in 0..1000 + 10_000 + 500 {
            last = arrival(link.offer(Duration::ZERO, 1000));
        }
        assert_eq!(last, MS * 2500);
    }

    #[test]
    fn the_bursty_profile_loses_half_a_percent() {
        let mut link = Link::new(&Profile::named("bursty").unwrap(), 5);
        let lost = (0..1_000_000)
            .filter(|i| link.offer(MS * *i, 1500) == Verdict::Drop(Reason::Loss))
            .count();
        assert!((4_500..=5_500).contains(&lost), "{lost}");
    }

    #[test]
    fn burst_loss_comes_in_runs() {
        let burst = Burst { start: 0.001, stop: 0.1, loss: 1.0 };
        let mut link = Link::new(&Profile { burst: Some(burst), ..profile(1000, 5) }, 3);
        let (mut lost, mut runs, mut before) = (0_u32, 0_u32, false);
        for i in 0..200_000_u32 {
            let now = link.offer(MS * i, 1500) == Verdict::Drop(Reason::Loss);
            lost += u32::from(now);
            runs += u32::from(now && !before);
            before = now;
        }
        // A bad state lasts 10 packets on average and comes about every 1000th.
        assert!((100..=300).contains(&runs), "{runs} runs");
        let mean = f64::from(lost) / f64::from(runs);
        assert!((7.0..=14.0).contains(&mean), "{mean} packets a run");
    }

    #[test]
    fn a_late_look_wastes_no_rate_and_makes_nothing_early() {
        let mut link = Link::new(&profile(100, 10), 1);
        // Two packets reached the link at 0 and at 120 us, both noticed at 3 ms.
        let first = arrival(link.offer_noticed(Duration::ZERO, MS * 3, 1500));
        let second = arrival(link.offer_noticed(Duration::from_micros(120), MS * 3, 1500));
        assert_eq!((first, second), (MS * 8, MS * 8));
        // The bottleneck is free again at 240 us: a packet at 3 ms waits for nothing.
        assert_eq!(arrival(link.offer(MS * 3, 1500)), MS * 8 + Duration::from_micros(120));
    }

    proptest! {
        #[test]
        fn order_delay_and_rate_hold_for_any_offers(
            seed: u64,
            rate_mbit in 1_u64..2_000,
            rtt_ms in 0_u64..300,
            jitter_us in 0_u64..20_000,
            loss in 0.0..0.3_f64,
            offers in prop::collection::vec((0_u64..3_000, 20_u32..9_000), 1..400),
        ) {
            let profile = Profile { jitter_us, loss, ..profile(rate_mbit, rtt_ms) };
            let mut link = Link::new(&profile, seed);
            let (mut now, mut last) = (Duration::ZERO, Duration::ZERO);
            let mut accepted_bits = 0_u128;
            for (gap_us, len) in offers {
                now += Duration::from_micros(gap_us);
                match link.offer(now, len) {
                    Verdict::Deliver(at) => {
                        accepted_bits += u128::from(len) * 8;
                        prop_assert!(at >= last, "reordered");
                        prop_assert!(at >= now + profile.one_way(), "too early");
                        // All that was delivered must have passed the bottleneck since 0.
                        let passed = at - profile.one_way();
                        prop_assert!(
                            accepted_bits * 1_000_000_000
                                <= (passed.as_nanos() + 1) * u128::from(profile.rate_bits_per_s)
                        );
                        // Queue, delay and jitter bound every wait.
                        let queue_ns = u128::from(profile.queue_bytes()) * 8_000_000_000
                            / u128::from(profile.rate_bits_per_s);
                        let longest = queue_ns
                            + profile.one_way().as_nanos()
                            + u128::from(jitter_us) * 1000;
                        prop_assert!((at - now).as_nanos() <= longest + 1);
                        last = at;
                    }
                    Verdict::Drop(reason) => prop_assert_ne!(reason, Reason::Cut),
                }
            }
            prop_assert!(link.queue_peak_bytes() <= profile.queue_bytes());
        }
    }
}
