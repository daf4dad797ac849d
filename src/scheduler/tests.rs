//! What holds for any plan, and the rules of balancing one by one.

use proptest::prelude::*;

use crate::decision::{Decision, Nothing, Plan, Refusal};
use crate::forecast::{Band, Forecast, Predictor};
use crate::plan;
use crate::policy::{Goal, Policy};
use crate::state::{Host, InvalidState, Moved, State, Vm};

const NOW_S: i64 = 1_000_000;

/// Hosts of 10 CPUs, each with VMs that ask for so much.
fn state(hosts: &[&[f64]]) -> State {
    let mut state = State { migration_mib_s: 100.0, ..State::default() };
    for (number, asked) in hosts.iter().enumerate() {
        state.hosts.push(Host {
            name: format!("h{number}"),
            cpu: 10.0,
            cpu_per_vm: 10.0,
            memory_mib: 100_000,
            watts: (90.0, 130.0),
            is_on: true,
            is_in_maintenance: false,
            is_settling: false,
            sampled_at_s: NOW_S - 60,
            asked: vec![asked.iter().sum(); 3],
        });
        for &asked in *asked {
            state.vms.push(Vm {
                name: format!("v{}", state.vms.len()),
                host: number,
                asked,
                memory_mib: 1000,
                move_mib: 1000,
                is_pinned: false,
                is_migrating: false,
                together: None,
                apart: None,
            });
        }
    }
    state
}

fn forecasts(state: &State) -> Vec<Forecast> {
    let band = |mean| Band { mean, deviation: 0.1 };
    let of = |vm: &Vm| Forecast {
        soon: band(vm.asked),
        later: band(vm.asked),
        predictor: Predictor::Last,
    };
    state.vms.iter().map(of).collect()
}

fn balanced(state: &State) -> Plan {
    plan(state, &forecasts(state), &Policy::new(Goal::Balance), NOW_S, 1).unwrap()
}

fn refused(plan: &Plan) -> Option<Refusal> {
    plan.decisions.iter().find_map(|decision| match decision {
        Decision::Nothing { because: Nothing::NoMove { refused }, .. } => Some(*refused),
        _ => None,
    })
}

const HOT: [&[f64]; 2] = [&[3.0, 3.0, 3.0], &[1.0]];

#[test]
fn a_hot_host_is_relieved_and_the_reason_is_a_sentence() {
    let plan = balanced(&state(&HOT));
    assert_eq!(plan.moves().count(), 1);
    let said = plan.decisions[0].to_string();
    assert!(said.starts_with("move v"), "{said}");
    assert!(said.contains("90 % of h0 is asked for"), "{said}");
}

#[test]
fn of_equal_relief_the_lighter_vm_goes() {
    let mut state = state(&HOT);
    state.vms[1].move_mib = 100;
    assert_eq!(balanced(&state).moves().next().unwrap().vm, "v1");
}

#[test]
fn a_peak_that_passes_moves_nothing() {
    let state = state(&HOT);
    let mut forecasts = forecasts(&state);
    for forecast in &mut forecasts {
        forecast.soon.mean /= 2.0;
    }
    let plan = plan(&state, &forecasts, &Policy::new(Goal::Balance), NOW_S, 1).unwrap();
    let passing = Decision::Nothing { host: "h0".into(), because: Nothing::Passing { then: 0.45 } };
    assert_eq!(plan.decisions, [passing]);
    let mut once = state;
    once.hosts[0].asked = vec![2.0, 2.0, 9.0];
    let twice = Policy { hot_samples: 2, hot_of: 3, ..Policy::new(Goal::Balance) };
    let plan = crate::plan(&once, &forecasts, &twice, NOW_S, 1).unwrap();
    assert_eq!(plan.decisions, [], "hot in one of three samples");
}

#[test]
fn rules_refuse_and_say_which() {
    let mut pinned = state(&HOT);
    pinned.vms.iter_mut().for_each(|vm| vm.is_pinned = true);
    let mut cooling = state(&HOT);
    for vm in ["v0", "v1", "v2"] {
        cooling.moved.push(Moved { vm: vm.into(), from: 1, to: 0, at_s: NOW_S - 100 });
    }
    let mut returning = cooling.clone();
    returning.moved.iter_mut().for_each(|moved| moved.at_s = NOW_S - 5000);
    let mut apart = state(&HOT);
    apart.vms.iter_mut().for_each(|vm| vm.apart = Some("db".into()));
    let mut together = state(&HOT);
    together.vms.iter_mut().for_each(|vm| vm.together = Some("web".into()));
    let mut small = state(&HOT);
    small.hosts[1].memory_mib = 1500;
    let full = state(&[&[3.0, 3.0, 3.0], &[7.0]]);
    for (state, why) in [
        (pinned, Refusal::Pinned),
        (cooling, Refusal::Cooldown),
        (returning, Refusal::Return),
        (apart, Refusal::Affinity),
        (together, Refusal::Affinity),
        (small, Refusal::Memory),
        (full, Refusal::Cpu),
    ] {
        let plan = balanced(&state);
        assert_eq!(plan.moves().count(), 0, "{why:?}");
        assert_eq!(refused(&plan), Some(why));
    }
}

#[test]
fn samples_that_are_old_or_lie_freeze_their_host() {
    for spoil in [
        (|host: &mut Host| host.sampled_at_s = NOW_S - 3600) as fn(&mut Host),
        |host| host.sampled_at_s = NOW_S + 60,
        |host| host.asked.clear(),
        |host| host.asked = vec![f64::NAN; 3],
        |host| host.asked = vec![-1.0; 3],
        |host| host.asked = vec![1e12; 3],
    ] {
        for host in 0..2 {
            let mut state = state(&HOT);
            spoil(&mut state.hosts[host]);
            let plan = balanced(&state);
            assert_eq!(plan.moves().count(), 0, "{:?}", plan.decisions);
            assert!(!plan.decisions.is_empty());
        }
    }
}

#[test]
fn a_host_in_maintenance_is_drained_cooldown_or_not() {
    let mut state = state(&[&[1.0, 2.0], &[1.0], &[1.0]]);
    state.hosts[0].is_in_maintenance = true;
    state.moved.push(Moved { vm: "v0".into(), from: 3, to: 0, at_s: NOW_S - 10 });
    let plan = balanced(&state);
    assert_eq!(plan.moves().count(), 2);
    assert!(plan.moves().all(|one| one.from == "h0"));
}

#[test]
fn consolidation_empties_a_host_whole_and_only_if_all_fit() {
    let policy = Policy::new(Goal::Consolidate);
    let few = state(&[&[1.0, 1.0], &[3.0], &[3.0]]);
    let moves = plan(&few, &forecasts(&few), &policy, NOW_S, 1).unwrap();
    assert!(moves.moves().filter(|one| one.from == "h0").count() == 2, "{moves:?}");
    let many = state(&[&[4.0, 4.0], &[7.0]]);
    assert_eq!(plan(&many, &forecasts(&many), &policy, NOW_S, 1).unwrap().moves().count(), 0);
}

#[test]
fn what_contradicts_itself_is_an_error_that_says_so() {
    let mut lost = state(&HOT);
    lost.vms[0].host = 7;
    let forecasts = forecasts(&lost);
    let error = plan(&lost, &forecasts, &Policy::new(Goal::Balance), NOW_S, 1).unwrap_err();
    assert_eq!(error.to_string(), "VM v0 is said to run on host number 7, and there are 2 hosts");
    let state = state(&HOT);
    let policy = Policy { leave: 0.9, ..Policy::new(Goal::Balance) };
    let error = plan(&state, &forecasts, &policy, NOW_S, 1).unwrap_err();
    assert!(matches!(error, InvalidState::Policy(_)), "{error}");
    let error = plan(&state, &[], &Policy::new(Goal::Balance), NOW_S, 1).unwrap_err();
    assert_eq!(error, InvalidState::Forecasts { vms: 4, forecasts: 0 });
}

prop_compose! {
    fn any_state()(
        hosts in prop::collection::vec(prop::collection::vec(0.0..5.0, 0..6), 1..8),
        spoiled in prop::collection::vec(0..12_u8, 8),
    ) -> State {
        let hosts: Vec<&[f64]> = hosts.iter().map(Vec::as_slice).collect();
        let mut state = state(&hosts);
        for (host, how) in state.hosts.iter_mut().zip(spoiled) {
            match how {
                0 => host.sampled_at_s = i64::MIN,
                1 => host.asked = vec![f64::INFINITY],
                2 => host.is_in_maintenance = true,
                3 => host.sampled_at_s = i64::MAX,
                _ => {}
            }
        }
        state
    }
}

proptest! {
    #[test]
    fn any_plan_keeps_the_rules(state in any_state(), seed: u64, consolidates: bool) {
        let goal = if consolidates { Goal::Consolidate } else { Goal::Balance };
        let (policy, forecasts) = (Policy::new(goal), forecasts(&state));
        let plan = plan(&state, &forecasts, &policy, NOW_S, seed).unwrap();
        // A record of the input replays to the same plan, bit for bit.
        let record = serde_json::to_string(&(&state.vms, &forecasts)).unwrap();
        let (vms, read): (Vec<Vm>, Vec<Forecast>) = serde_json::from_str(&record).unwrap();
        let again = State { vms, ..state.clone() };
        prop_assert_eq!(&crate::plan(&again, &read, &policy, NOW_S, seed).unwrap(), &plan);

        let mut moved: Vec<_> = plan.moves().map(|one| &one.vm).collect();
        moved.sort();
        prop_assert!(moved.windows(2).all(|pair| pair[0] != pair[1]), "a VM moves twice");
        for one in plan.moves() {
            let host = |name: &str| state.hosts.iter().find(|host| host.name == name).unwrap();
            let (from, to) = (host(&one.from), host(&one.to));
            prop_assert!(one.from != one.to && !to.is_in_maintenance);
            for host in [from, to] {
                prop_assert!(host.sampled_at_s == NOW_S - 60 && host.asked[0].is_finite());
            }
            prop_assert!(from.is_in_maintenance || one.gain > one.cost, "{}", one);
        }
        for host in state.hosts.iter().filter(|host| !host.is_in_maintenance) {
            let arrive = plan.moves().filter(|one| one.to == host.name).count();
            prop_assert!(arrive <= policy.moves_per_host);
        }
    }
}
