//! What hosts report, and the plans that come of it.

use longhaul_scheduler::decision::{Decision, Nothing};
use longhaul_scheduler::plan;

use super::super::store::{Order, PastMove};
use super::*;
use crate::config::{Config, Overrides};

const NOW: i64 = 1_000_000;

fn config() -> SchedulerConfig {
    let text = "[agent]\nname = \"paris\"\n[scheduler]\nhosts = [\"lyon\", \"nice\"]\n\
                vms = { db1 = { apart = \"db\" }, gw = { pinned = true } }\n";
    let file = std::path::Path::new("agent.toml");
    Config::parse(file, text, &Overrides::default()).unwrap().scheduler
}

fn vm(name: &str, cpu: f64, memory_mib: u64) -> VmLoad {
    VmLoad {
        name: name.into(),
        runs: true,
        cpu: Some(cpu),
        vcpus: 2,
        memory_mib,
        disk_mib: 1000,
        written_bytes_s: 0.0,
        seeded_at: None,
    }
}

fn host(vms: Vec<VmLoad>) -> Heard {
    let load = HostLoad {
        name: "whatever it calls itself".into(),
        fingerprint: String::new(),
        age_ms: Some(1000),
        cores: 4.0,
        cpu: vms.iter().filter_map(|vm| vm.cpu).sum(),
        memory_mib: 16_000,
        pressure: None,
        network_bytes_s: (0.0, 0.0),
        cap_bytes_s: None,
        vms,
        links: vec![],
        jobs: vec![],
        recent: vec![],
    };
    Heard { load, sampled_at_s: NOW - 1 }
}

fn heard(hosts: Vec<(&str, Heard)>) -> BTreeMap<String, Heard> {
    hosts.into_iter().map(|(name, heard)| (name.to_owned(), heard)).collect()
}

/// A memory that has watched these hosts ask for the same for ten samples.
fn watched(heard: &BTreeMap<String, Heard>) -> Memory {
    let mut memory = Memory::default();
    for step in (0..10).rev() {
        for (name, heard) in heard {
            memory.observe_host(name, heard.load.cpu);
            for vm in &heard.load.vms {
                memory.observe_vm(&vm.name, name, NOW - step * 300, vm.cpu);
            }
        }
    }
    memory
}

fn decisions(heard: &BTreeMap<String, Heard>, memory: &Memory) -> Vec<Decision> {
    let Picture { state, forecasts } = picture(heard, memory, &config(), NOW);
    plan(&state, &forecasts, &policy(&config()), NOW, 1).unwrap().decisions
}

fn moves(decisions: &[Decision]) -> Vec<(&str, &str, &str)> {
    fn of(decision: &Decision) -> Option<(&str, &str, &str)> {
        match decision {
            Decision::Move(one) => Some((&one.vm, &one.from, &one.to)),
            Decision::Nothing { .. } => None,
        }
    }
    decisions.iter().filter_map(of).collect()
}

/// Two VMs that ask for the same, one of which is lighter to move, and an idle host.
fn hot() -> BTreeMap<String, Heard> {
    heard(vec![
        ("paris", host(vec![vm("db1", 2.0, 8000), vm("web", 1.9, 500), vm("gw", 0.1, 100)])),
        ("lyon", host(vec![vm("mail", 0.2, 500)])),
    ])
}

#[test]
fn the_lighter_vm_leaves_the_hot_host() {
    let hosts = hot();
    assert_eq!(moves(&decisions(&hosts, &watched(&hosts))), [("web", "paris", "lyon")]);
}

#[test]
fn what_is_doubtful_stays() {
    let hosts = hot();
    let memory = watched(&hosts);
    let alone = |change: fn(&mut BTreeMap<String, Heard>, &mut Memory)| {
        let (mut hosts, mut memory) = (hosts.clone(), memory.clone());
        change(&mut hosts, &mut memory);
        let decided = decisions(&hosts, &memory);
        moves(&decided).iter().map(|(vm, ..)| (*vm).to_owned()).collect::<Vec<_>>()
    };
    // Another host reports it, too; and what it may ask for there leaves no room for the other one.
    assert_eq!(
        alone(|hosts, _| hosts.get_mut("lyon").unwrap().load.vms.push(vm("web", 0.0, 500))),
        [""; 0]
    );
    // It has not been measured yet: who is hot, and because of whom, is not known.
    assert_eq!(alone(|hosts, _| hosts.get_mut("paris").unwrap().load.vms[1].cpu = None), [""; 0]);
    // Its last order failed.
    let failed = |_: &mut BTreeMap<String, Heard>, memory: &mut Memory| {
        memory.note_order(Order {
            vm: "web".into(),
            from: "paris".into(),
            to: "lyon".into(),
            at: jiff::Timestamp::from_second(NOW - 60).unwrap(),
            because: String::new(),
            mib: 1,
            whole_mib: 1,
            seconds: 1.0,
            job: None,
            beyond: 0,
            outcome: OrderOutcome::Failed { what: "no".into() },
        });
    };
    assert_eq!(alone(failed), ["db1"]);
    // It moved a while ago.
    assert_eq!(
        alone(|hosts, memory| {
            hosts.insert("nice".into(), host(vec![]));
            let (vm, from, to) = ("web".to_owned(), "nice".to_owned(), "paris".to_owned());
            memory.note_move(PastMove { vm, from, to, at_s: NOW - 60 });
        }),
        ["db1"]
    );
}

#[test]
fn a_host_that_is_not_heard_is_frozen_and_takes_nothing() {
    let mut hosts = hot();
    let memory = watched(&hosts);
    for age_s in [5000, -5000, i64::MAX / 2] {
        hosts.get_mut("lyon").unwrap().sampled_at_s = NOW.saturating_sub(age_s);
        let decided = decisions(&hosts, &memory);
        assert!(moves(&decided).is_empty(), "{age_s}: {decided:?}");
        let is_stale = |one: &Decision| matches!(one, Decision::Nothing { host, because: Nothing::Stale { .. } } if host == "lyon");
        assert!(decided.iter().any(is_stale), "{decided:?}");
    }
}

#[test]
fn a_host_in_maintenance_is_emptied_but_for_what_is_pinned() {
    let hosts = hot();
    let mut memory = watched(&hosts);
    memory.maintenance.insert("lyon".into());
    let decided = decisions(&hosts, &memory);
    assert!(moves(&decided).is_empty(), "{decided:?}");
    let quiet = heard(vec![
        ("paris", host(vec![vm("db1", 0.2, 8000), vm("gw", 0.1, 100)])),
        ("lyon", host(vec![])),
    ]);
    let mut memory = watched(&quiet);
    memory.maintenance.insert("paris".into());
    assert_eq!(moves(&decisions(&quiet, &memory)), [("db1", "paris", "lyon")]);
}

#[test]
fn links_are_worth_what_they_carried() {
    let mut hosts = hot();
    assert!((migration_mib_s(&hosts, &config()) - 12.5e6 / MIB).abs() < 1e-9);
    let link = |bytes_s| crate::control::LinkLoad { peer: String::new(), rtt_ms: 80.0, bytes_s };
    hosts.get_mut("lyon").unwrap().load.links = vec![link(0.0), link(50.0 * MIB)];
    assert_eq!(migration_mib_s(&hosts, &config()), 50.0);
}
