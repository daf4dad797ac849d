//! What holds for any evacuation, its plans held against every order of a few VMs, and its reasons.

use proptest::prelude::*;

use super::departure::{Departure, Left};
use super::evacuate;
use super::need::{Evacuation, Guest, Path, Target, UnderWay};
use super::transfer::{Clock, Load, send};
use crate::state::InvalidState;

const NOW_S: i64 = 1_000_000;
const SLOTS: usize = 24;

fn guest(name: &str, weight: f64, mib: u64, dirty: f64) -> Guest {
    Guest {
        name: name.to_owned(),
        host: "rack1".to_owned(),
        site: 0,
        weight,
        memory_mib: mib,
        disk_mib: 0,
        cpu: 1.0,
        dirty_mib_s: vec![dirty],
        dirty_high_mib_s: Vec::new(),
        is_pinned: false,
        under_way: None,
    }
}

/// One path of 10 MiB/s for two hours.
fn need(guests: Vec<Guest>) -> Evacuation {
    let target =
        |name: &str| Target { name: name.to_owned(), site: 1, memory_mib: 1 << 30, cpu: 1000.0 };
    Evacuation {
        guests,
        targets: vec![target("far1"), target("far2")],
        paths: vec![Path {
            name: "atlantic".to_owned(),
            from: 0,
            to: 1,
            leftover_mib_s: vec![10.0; SLOTS],
            cautious_mib_s: Vec::new(),
            streams: 1,
        }],
        slots_from_s: NOW_S,
        slot_s: 300,
        deadline_s: NOW_S + 7200,
        pause_s: 0.3,
        reserve_s: 0,
        previous: None,
    }
}

fn names(plan: &Departure) -> Vec<&str> {
    plan.goes.iter().map(|goes| &*goes.vm).collect()
}

fn planned(need: &Evacuation) -> Departure {
    evacuate(need, NOW_S, 1).unwrap()
}

#[test]
fn the_dense_go_first_and_each_line_is_a_sentence() {
    // 72,000 MiB in two hours.
    let plan = planned(&need(vec![
        guest("big", 8.0, 60_000, 0.0),
        guest("small", 4.0, 10_000, 0.0),
        guest("light", 1.0, 50_000, 0.0),
    ]));
    assert_eq!(names(&plan), ["small", "big"]);
    assert_eq!((plan.saved_weight, plan.weight), (12.0, 13.0));
    assert_eq!(plan.goes[0].end_s, NOW_S + 1000);
    assert_eq!(plan.curve.last().map(|point| point.weight), Some(12.0));
    assert_eq!(plan.curve[1].weight, 4.0);
    let said = plan.goes[0].to_string();
    assert_eq!(
        said,
        "send small from rack1 to far1 over atlantic (10000 MiB): it weighs 4, 0.410 for each GiB, \
         and arrives 6200 s before the deadline; promised: it does so over the cautious link too"
    );
    let said = plan.stays[0].to_string();
    assert!(said.contains("needs 5000 s and at most 200 s are left"), "{said}");
}

#[test]
fn who_cannot_be_saved_is_told_why() {
    let mut guests = vec![
        guest("pinned", 1.0, 10, 0.0),
        guest("busy", 2.0, 10_000, 12.0),
        guest("huge", 3.0, 100_000, 0.0),
        guest("lost", 4.0, 10, 0.0),
        guest("wide", 5.0, 10, 0.0),
        guest("fine", 6.0, 10, 0.0),
    ];
    guests[0].is_pinned = true;
    guests[3].site = 7;
    guests[4].cpu = 5000.0;
    let plan = planned(&need(guests.clone()));
    assert_eq!(names(&plan), ["fine"]);
    let why: Vec<&Left> = plan.stays.iter().map(|stays| &stays.because).collect();
    assert!(
        matches!(
            &*why,
            [
                Left::NoHost,
                Left::NoPath,
                Left::TooBig { .. },
                Left::NeverQuiet { .. },
                Left::Pinned
            ]
        ),
        "{why:?}"
    );
    let mut late = need(guests);
    late.deadline_s = NOW_S;
    let plan = planned(&late);
    assert!(plan.goes.is_empty() && plan.curve.is_empty());
    assert_eq!(plan.stays.iter().filter(|stays| stays.because == Left::Late).count(), 5);
}

#[test]
fn a_busy_guest_goes_in_its_quiet_hour() {
    let mut busy = guest("busy", 5.0, 20_000, 0.0);
    busy.dirty_mib_s = (0..SLOTS).map(|slot| if slot < 12 { 9.9 } else { 0.0 }).collect();
    let plan = planned(&need(vec![busy, guest("calm", 1.0, 35_000, 0.0)]));
    assert_eq!(names(&plan), ["calm", "busy"]);
}

#[test]
fn room_at_the_targets_is_not_given_twice() {
    let mut tight = need((0..4).map(|n| guest(&format!("g{n}"), 1.0, 1000, 0.0)).collect());
    for target in &mut tight.targets {
        target.memory_mib = 1500;
    }
    let plan = planned(&tight);
    let mut to: Vec<_> = plan.goes.iter().map(|goes| &*goes.to).collect();
    to.sort_unstable();
    assert_eq!(to, ["far1", "far2"]);
    assert_eq!(plan.stays.len(), 2);
}

#[test]
fn streams_share_a_path_that_one_does_not_fill() {
    let mut wide = need((0..4).map(|n| guest(&format!("g{n}"), 1.0, 10_000, 0.0)).collect());
    wide.paths[0].streams = 2;
    let plan = planned(&wide);
    assert_eq!(plan.goes.iter().filter(|goes| goes.start_s == NOW_S).count(), 2);
    assert!(plan.goes[0].to_string().contains("50 % of the path"), "{}", plan.goes[0]);
}

#[test]
fn promises_outlive_a_shock_and_lighter_ones_give_way() {
    let guests = vec![
        guest("heavy", 8.0, 30_000, 0.0),
        guest("light", 5.0, 15_000, 0.0),
        guest("dense", 6.0, 20_000, 0.0),
    ];
    let mut before = need(guests);
    before.paths[0].cautious_mib_s = vec![9.5; SLOTS];
    let plan = planned(&before);
    assert_eq!(plan.promised, ["heavy", "dense", "light"]);
    // The link halves: 36,000 MiB are left, and not all promises can be kept.
    let mut after = before.clone();
    after.paths[0].leftover_mib_s = vec![5.0; SLOTS];
    after.paths[0].cautious_mib_s = vec![4.9; SLOTS];
    after.previous = Some(Box::new(plan));
    let plan = planned(&after);
    assert_eq!((names(&plan), &*plan.promised), (vec!["heavy"], &["heavy".to_owned()][..]));
    assert_eq!(plan.broken, ["dense", "light"]);
    // What was not promised stays for it, even if it is worth more.
    after.guests.push(guest("new", 100.0, 33_000, 0.0));
    let plan = planned(&after);
    assert_eq!(names(&plan), ["heavy"]);
    after.previous = None;
    assert_eq!(names(&planned(&after)), ["new"]);
}

#[test]
fn one_under_way_goes_on_when_that_is_best() {
    let mut going = need(vec![
        guest("going", 2.0, 40_000, 0.0),
        guest("other", 2.0, 60_000, 0.0),
        guest("small", 1.0, 10_000, 0.0),
    ]);
    going.guests[1].under_way = Some(UnderWay { path: 0, target: 1, sent_mib: 45_000.0 });
    let plan = planned(&going);
    assert_eq!(plan.goes[0].vm, "other");
    assert_eq!((&*plan.goes[0].to, plan.goes[0].mib), ("far2", 15_000));
    assert_eq!(plan.goes.len(), 3);
    assert!(plan.goes[0].to_string().starts_with("go on sending other"), "{}", plan.goes[0]);
}

#[test]
fn what_contradicts_itself_is_an_error_and_what_is_empty_a_plan() {
    let fine = need(vec![guest("a", 1.0, 10, 0.0)]);
    let wrong: [fn(&mut Evacuation); 17] = [
        |need| need.guests[0].weight = 0.0,
        |need| need.guests[0].weight = f64::NAN,
        |need| need.guests[0].dirty_mib_s = vec![],
        |need| need.guests[0].dirty_mib_s = vec![1.0, 2.0],
        |need| need.guests[0].dirty_mib_s = vec![f64::INFINITY],
        |need| need.guests[0].dirty_high_mib_s = vec![-1.0],
        |need| need.guests[0].memory_mib = 0,
        |need| need.guests[0].cpu = f64::NAN,
        |need| {
            need.guests[0].under_way = Some(UnderWay { path: 3, target: 0, sent_mib: 0.0 });
        },
        |need| need.guests.push(need.guests[0].clone()),
        |need| need.paths[0].leftover_mib_s = vec![1.0],
        |need| need.paths[0].leftover_mib_s[0] = f64::NAN,
        |need| need.paths[0].cautious_mib_s = vec![1.0],
        |need| need.paths[0].streams = 0,
        |need| need.slot_s = 0,
        |need| need.deadline_s = i64::MAX,
        |need| need.slots_from_s = NOW_S + 1,
    ];
    for (number, spoil) in wrong.iter().enumerate() {
        let mut spoiled = fine.clone();
        spoil(&mut spoiled);
        let said = evacuate(&spoiled, NOW_S, 1).map(|plan| plan.to_string());
        assert!(said.is_err(), "{number}: {said:?}");
    }
    let error = evacuate(&Evacuation { slot_s: 0, ..fine.clone() }, NOW_S, 1).unwrap_err();
    assert!(matches!(error, InvalidState::Evacuation(_)), "{error}");
    let mut nobody = fine.clone();
    nobody.guests.clear();
    assert_eq!(
        planned(&nobody).to_string(),
        "0 VMs go, 0 of them promised, and 0 stay: 0 of 0 by weight"
    );
    let nowhere = Evacuation { paths: vec![], targets: vec![], ..fine };
    assert_eq!(planned(&nowhere).stays[0].because, Left::NoPath);
}

/// The most weight that any order over one path saves: of each set, the earliest end.
fn optimum(need: &Evacuation) -> f64 {
    let clock = Clock { slot_s: 300.0, now: 0.0, deadline: 7200.0, pause_s: need.pause_s };
    let count = need.guests.len();
    let mut ends = vec![None; 1 << count];
    ends[0] = Some(0.0);
    let mut best = 0.0_f64;
    for set in 1..1_usize << count {
        let inside = || (0..count).filter(move |item| set & 1 << item != 0);
        ends[set] = inside()
            .filter_map(|item| {
                let of = &need.guests[item];
                let whole = (of.memory_mib + of.disk_mib) as f64;
                let load = Load { whole, left: whole, dirty: &of.dirty_mib_s };
                let start = ends[set & !(1 << item)]?;
                send(&clock, &need.paths[0].leftover_mib_s, load, start, &mut 0)
            })
            .map(|sent| sent.end)
            .reduce(f64::min);
        if ends[set].is_some() {
            best = best.max(inside().map(|item| need.guests[item].weight).sum());
        }
    }
    best
}

prop_compose! {
    fn any_need()(
        guests in prop::collection::vec(
            (1..9_u8, 1000..30_000_u64, prop::collection::vec(0.0..8.0_f64, SLOTS), any::<bool>()),
            1..9,
        ),
        link in prop::collection::vec(2.0..20.0_f64, SLOTS),
        caution in 0.5..1.0_f64,
        reserve_s in 0..1800_u32,
    ) -> Evacuation {
        let guest = |(number, (weight, mib, dirty, rests)): (usize, (u8, u64, Vec<f64>, bool))| {
            let mut guest = guest(&format!("g{number}"), f64::from(weight), mib, 0.0);
            if !rests {
                guest.dirty_high_mib_s = dirty.iter().map(|dirty| dirty * 1.5).collect();
                guest.dirty_mib_s = dirty;
            }
            guest
        };
        let mut need = need(guests.into_iter().enumerate().map(guest).collect());
        need.paths[0].cautious_mib_s = link.iter().map(|rate| rate * caution).collect();
        need.paths[0].leftover_mib_s = link;
        need.reserve_s = reserve_s;
        need
    }
}

/// What every plan keeps, whatever it is made of.
fn keeps_the_rules(need: &Evacuation, plan: &Departure) -> Result<(), TestCaseError> {
    prop_assert_eq!(plan.goes.len() + plan.stays.len(), need.guests.len());
    let mut all: Vec<&String> = plan
        .goes
        .iter()
        .map(|goes| &goes.vm)
        .chain(plan.stays.iter().map(|stays| &stays.vm))
        .collect();
    all.sort();
    all.dedup();
    prop_assert_eq!(all.len(), need.guests.len(), "someone is in it twice");
    for promised in &plan.promised {
        prop_assert!(plan.goes.iter().any(|goes| goes.vm == *promised && goes.is_promised));
    }
    for pair in plan.goes.windows(2) {
        let after = pair[1].start_s + 1 >= pair[0].end_s;
        prop_assert!(pair[0].path != pair[1].path || pair[0].stream != pair[1].stream || after);
    }
    prop_assert!(plan.goes.iter().all(|goes| goes.end_s <= need.deadline_s));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_plan_saves_more_than_any_order_and_few_save_less(need in any_need(), seed: u64) {
        let plan = evacuate(&need, NOW_S, seed).unwrap();
        let optimum = optimum(&need);
        prop_assert!(plan.saved_weight <= optimum + 1e-9, "{} {}", plan.saved_weight, optimum);
        prop_assert!(plan.saved_weight >= 0.97 * optimum, "{} {}", plan.saved_weight, optimum);
        keeps_the_rules(&need, &plan)?;
        let record = serde_json::to_string(&need).unwrap();
        let read: Evacuation = serde_json::from_str(&record).unwrap();
        prop_assert_eq!(evacuate(&read, NOW_S, seed).unwrap(), plan);
    }

    #[test]
    fn a_second_plan_on_the_same_knowledge_breaks_no_promise(need in any_need(), seed: u64) {
        let first = evacuate(&need, NOW_S, seed).unwrap();
        let again = Evacuation { previous: Some(Box::new(first.clone())), ..need };
        let second = evacuate(&again, NOW_S, seed + 1).unwrap();
        keeps_the_rules(&again, &second)?;
        prop_assert!(second.broken.is_empty(), "{:?}", second.broken);
        prop_assert!(second.saved_weight >= first.saved_weight - 1e-9);
    }

    #[test]
    fn many_paths_and_hosts_keep_the_rules(
        sizes in prop::collection::vec((1..9_u8, 100..40_000_u64, 0.0..12.0_f64, 0..3_usize), 0..40),
        rates in prop::collection::vec((0.0..20.0_f64, 0..3_usize, 0..3_usize, 1..4_usize), 0..5),
        rooms in prop::collection::vec((0..100_000_u64, 0.0..9.0_f64, 0..3_usize), 0..6),
        seed: u64,
    ) {
        let mut need = need(Vec::new());
        need.guests = sizes.iter().enumerate().map(|(number, &(weight, mib, dirty, site))| Guest {
            site, ..guest(&format!("g{number}"), f64::from(weight), mib, dirty)
        }).collect();
        need.paths = rates.iter().enumerate().map(|(number, &(rate, from, to, streams))| Path {
            name: format!("p{number}"), from, to, streams,
            leftover_mib_s: vec![rate; SLOTS], cautious_mib_s: Vec::new(),
        }).collect();
        need.targets = rooms.iter().enumerate().map(|(number, &(memory_mib, cpu, site))| Target {
            name: format!("t{number}"), site, memory_mib, cpu,
        }).collect();
        let plan = evacuate(&need, NOW_S, seed).unwrap();
        keeps_the_rules(&need, &plan)?;
        for target in &need.targets {
            let here = || plan.goes.iter().filter(|goes| goes.to == target.name);
            let of = |vm: &str| need.guests.iter().find(|guest| guest.name == vm).unwrap();
            prop_assert!(here().map(|goes| of(&goes.vm).memory_mib).sum::<u64>() <= target.memory_mib);
            prop_assert!(here().count() as f64 <= target.cpu + 1e-9);
        }
        for goes in &plan.goes {
            let path = need.paths.iter().find(|path| path.name == goes.path).unwrap();
            let target = need.targets.iter().find(|target| target.name == goes.to).unwrap();
            let guest = need.guests.iter().find(|guest| guest.name == goes.vm).unwrap();
            prop_assert!(path.from == guest.site && path.to == target.site);
        }
    }
}
