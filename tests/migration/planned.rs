//! A planner and the hosts that obey it, for real: two sites, a WAN, guests that ask for CPU.

use std::path::PathBuf;
use std::time::Instant;

use longhaul_bench::fleet::{Fleet, Setup};
use longhaul_bench::guest::{Guest, Kind};
use longhaul_bench::netns::{self, Side};
use longhaul_bench::profile::Profile;
use longhaul_bench::wan::{Spec, Wan};
use serde_json::Value;

use super::stage::{LOOK_PERIOD, ONE_AT_A_TIME, PATIENCE, lab, qemu};

const HOSTS: [(&str, Side); 3] = [("paris", Side::A), ("lyon", Side::A), ("nice", Side::B)];

/// Fields are dropped in this order.
struct Region {
    fleet: Fleet,
    guest: Guest,
    wan: Wan,
    scratch: tempfile::TempDir,
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Region {
    /// `None`, and the reason said, where that is not possible.
    fn up(test: &str, rules: &str, cores: f64) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let possible = netns::is_possible().map_err(|error| format!("{error:#}"));
        let qemu = match possible.and_then(|()| qemu("LONGHAUL_QEMU_100")) {
            Ok(qemu) => qemu,
            Err(reason) => {
                eprintln!("SKIPPED {test}: {reason}");
                return None;
            }
        };
        let scratch = tempfile::Builder::new().prefix("lhp-").tempdir().unwrap();
        let profile = Profile {
            name: "test".to_owned(),
            rate_bits_per_s: 100_000_000,
            rtt_us: 20_000,
            ..Profile::named("metro").unwrap()
        };
        let name = format!("{test}-{}", std::process::id());
        let wan = Wan::up(&lab(), Spec { name, profile, seed: 1, stats_file: None }).unwrap();
        let setup = Setup {
            hosts: &HOSTS,
            folder: scratch.path(),
            qemu: &qemu,
            accel: "tcg",
            rules: rules.parse().unwrap(),
            cores,
        };
        let fleet = Fleet::start(&wan, &setup).unwrap();
        let guest = Guest::build(Kind::Tiny).unwrap();
        Some(Self { fleet, guest, wan, scratch, _turn: turn })
    }

    /// A guest that sweeps so many MiB of its memory a second, or does next to nothing.
    fn start(&self, host: &str, vm: &str, memory_mib: u32, sweep_mib_s: u32) {
        let mut guest = self.guest.clone();
        guest.machine.memory_mib = memory_mib;
        let load = format!(
            " survivor.mem_mib=16 survivor.dirty_mib_s=0 survivor.disk_kib_s=0 \
             survivor.sweep_mib_s={sweep_mib_s}"
        );
        guest.machine.append += &load;
        self.fleet.start_vm(host, vm, &guest).unwrap();
    }

    /// Everything of one host's.
    fn folder(&self, host: &str) -> PathBuf {
        self.scratch.path().join(host)
    }

    /// Changes a host's configuration and starts its agent anew.
    fn reconfigure(&mut self, host: &str, from: &str, to: &str) {
        let file = self.folder(host).join("agent.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&file, text.replace(from, to)).unwrap();
        self.fleet.kill(host).unwrap();
        self.fleet.restart(&self.wan, host).unwrap();
    }

    fn plan(&self) -> Value {
        self.fleet.ask("paris", &["plan"]).unwrap()
    }

    /// Asks for the plan until it is like that.
    fn until(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        self.ask_until(&["plan"], what, is_it)
    }

    /// Asks the planner until what it says is like that.
    fn ask_until(&self, ask: &[&str], what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.fleet.ask("paris", ask).unwrap();
            if is_it(&said) {
                return said;
            }
            let log = self.fleet.log("paris");
            assert!(Instant::now() < deadline, "{what} does not come: {said:#}\n{log}");
            std::thread::sleep(LOOK_PERIOD);
        }
    }
}

/// Names in an array of JSON.
fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

/// What a plan says of one host.
fn host<'a>(plan: &'a Value, name: &str) -> &'a Value {
    plan["hosts"].as_array().unwrap().iter().find(|host| host["name"] == name).unwrap()
}

fn is_done(order: &Value) -> bool {
    order["outcome"]["done"].is_object()
}

/// One host asks for more than it has: the planner moves the guest that is lightest to move, by itself,
/// and says why. Then a host is emptied for maintenance: shown first, done when it is asked for.
#[test]
fn a_hot_host_is_relieved_and_another_one_emptied() {
    let rules = "interval_s = 1\nact = false\ncooldown_s = 600\nhot_percent = 100\n";
    let Some(mut region) = Region::up("hot", rules, 1.0) else { return };
    // Whatever guests ask for on this machine, there is room for it elsewhere.
    for host in ["lyon", "nice"] {
        region.reconfigure(host, "cores = 1", "cores = 16");
    }
    region.start("paris", "quiet", 512, 0);
    region.start("lyon", "mail", 96, 0);
    region.start("paris", "big", 256, 50);
    region.start("paris", "small", 96, 50);
    // Guests that start ask for all they can get, which forecasts must have forgotten; and how fast this
    // machine is decides what is hot.
    let rest = region.until("rest", |plan| {
        ["small", "big", "quiet"].iter().all(|vm| {
            let deviation = |when: &str| plan["forecasts"][vm][when]["deviation"].as_f64();
            deviation("soon").is_some_and(|it| it < 0.15)
                && deviation("later").is_some_and(|it| it < 0.25)
        })
    });
    assert_eq!(rest["orders"], serde_json::json!([]), "it may only plan");
    let asked: f64 = ["small", "big", "quiet"]
        .iter()
        .map(|vm| rest["forecasts"][vm]["soon"]["mean"].as_f64().unwrap())
        .sum();
    let hot = format!("hot_percent = {}", (asked * 80.0).clamp(5.0, 95.0).round());
    region.reconfigure("paris", "hot_percent = 100", &hot);
    region.until("a plan to move it", |plan| {
        let decisions = plan["plan"]["decisions"].as_array();
        let mut moves = decisions.into_iter().flatten().map(|one| &one["move"]["vm"]);
        moves.any(|vm| vm == "small")
    });
    assert_eq!(region.plan()["orders"], serde_json::json!([]), "it may only plan");
    region.reconfigure("paris", "act = false", "act = true");

    let plan = region
        .until("a move", |plan| plan["orders"].as_array().unwrap().last().is_some_and(is_done));
    let first = plan["orders"].as_array().unwrap().last().unwrap();
    assert_eq!((&first["vm"], &first["from"]), (&"small".into(), &"paris".into()), "{first:#}");
    let because = first["because"].as_str().unwrap();
    assert!(because.contains("of paris is asked for") && because.contains("gains"), "{because}");
    let to = first["to"].as_str().unwrap();
    region.fleet.wait_at("small", to, PATIENCE).unwrap();
    region.fleet.wait_at("big", "paris", PATIENCE).unwrap();

    // Nobody plans for where a VM has only just come to, and no other host may have room for one more.
    region.ask_until(&["drain", "lyon"], "a plan for its maintenance", |shown| {
        shown["plan"].to_string().contains("maintenance")
    });
    assert_eq!(host(&region.plan(), "lyon")["is_in_maintenance"], false);
    region.fleet.wait_at("mail", "lyon", PATIENCE).unwrap();
    region.fleet.ask("paris", &["drain", "lyon", "--go"]).unwrap();
    region.until("an empty lyon", |plan| host(plan, "lyon")["vms"] == serde_json::json!([]));
    assert_ne!(region.fleet.places("mail").unwrap(), ["lyon"]);
    region.fleet.ask("paris", &["drain", "lyon", "--undo"]).unwrap();
    assert_eq!(host(&region.plan(), "lyon")["is_in_maintenance"], false);

    let records = region.folder("paris").join("state/plans.jsonl");
    let replayed = region.fleet.ask("paris", &["plan", "--replay", records.to_str().unwrap()]);
    let replayed = replayed.unwrap();
    assert!(replayed["same"].as_u64() >= Some(2) && replayed["other"] == serde_json::json!([]));
}

/// Only the peer that a host's operator named is answered, and a planner that nobody obeys plans nothing.
#[test]
fn a_host_obeys_one_planner() {
    let Some(mut region) = Region::up("obey", "interval_s = 1\n", 1.0) else { return };
    region.start("lyon", "web", 96, 0);
    region.until("lyon's report", |plan| names(&host(plan, "lyon")["vms"]) == ["web"]);
    region.fleet.kill("lyon").unwrap();
    let dead = region.until("silence", |plan| host(plan, "lyon")["trouble"].is_string());
    assert_eq!(names(&host(&dead, "lyon")["vms"]), ["web"], "what was known is kept");
    region.fleet.restart(&region.wan, "lyon").unwrap();
    region.reconfigure("lyon", "obeys = \"paris\"", "obeys = \"nice\"");
    let refused = region.until("a refusal", |plan| {
        host(plan, "lyon")["trouble"].as_str().is_some_and(|why| why.contains("does not obey"))
    });
    // It is frozen, and the plan says so.
    let plan = region.until("a frozen host", |plan| plan.to_string().contains("stale"));
    assert!(plan["orders"].as_array().unwrap().is_empty(), "{refused:#}");
    let asked = region.fleet.ask("nice", &["plan"]).unwrap_err().to_string();
    assert!(asked.contains("plans for nobody"), "{asked}");
}

/// A move begins in its window, keeps its cap, pauses when the window closes and ends in the next.
#[test]
fn a_move_keeps_to_its_windows() {
    let Some(region) = Region::up("window", "", 1.0) else { return };
    region.start("paris", "web", 96, 0);
    let clock = |in_s: i64| {
        let at = jiff::Zoned::now().checked_add(jiff::SignedDuration::from_secs(in_s)).unwrap();
        at.strftime("%H:%M:%S").to_string()
    };
    let (first, second) = ((4, 10), (18, 600));
    let windows =
        format!("{}-{}; {}-{}", clock(first.0), clock(first.1), clock(second.0), clock(second.1));
    let wish = ["migrate", "web", "--to", "nice", "--rate", "12M", "--window", &windows];
    let said = region.fleet.ask("paris", &wish).unwrap();
    assert!(said["said"].as_str().unwrap().starts_with("web waits for"), "{said}");
    let again = region.fleet.ask("paris", &wish).unwrap_err().to_string();
    assert!(again.contains("waits for a window already"), "{again}");

    // What is seen of it, from its wish to its end.
    let (mut phases, mut most) = (Vec::new(), 0);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = region.fleet.status("paris").unwrap();
        let waits = status["waiting"].as_array().unwrap().first();
        let job = status["jobs"].as_array().unwrap().first();
        let open = waits.map(|waits| waits["is_open"] == true);
        let phase = (open, job.map(|job| job["kind"].as_str().unwrap().to_owned()));
        if let Some(job) = job {
            let sent = job["progress"]["wire_bytes"].as_u64().unwrap();
            if phases.len() <= 3 {
                most = most.max(sent);
            }
        }
        if phases.last() != Some(&phase) {
            phases.push(phase);
        }
        if waits.is_none() {
            break;
        }
        assert!(Instant::now() < deadline, "{status:#}\n{}", region.fleet.log("paris"));
        std::thread::sleep(LOOK_PERIOD);
    }
    region.fleet.wait_at("web", "nice", PATIENCE).unwrap();
    let kinds: Vec<&str> = phases.iter().filter_map(|(_, kind)| kind.as_deref()).collect();
    assert_eq!(phases[0], (Some(false), None), "nothing before its window: {phases:?}");
    assert!(kinds.starts_with(&["seed"]) && kinds.ends_with(&["migrate"]), "{phases:?}");
    let paused = phases.iter().skip(1).any(|phase| *phase == (Some(false), None));
    assert!(paused, "it does not pause: {phases:?}");
    // 12 Mbit/s for 6 s, and what a clock and a start may add.
    let cap = 12_000_000 / 8 * 7;
    assert!(most > 0 && most <= cap, "{most} bytes in the first window, {cap} are allowed");
}

/// An evacuation says whom it saves before it starts, and saves them; the planner's death stops nothing
/// that is under way, and it goes on when it is back.
#[test]
fn an_evacuation_saves_whom_it_promised() {
    let rules = "interval_s = 2\nlink = \"100M\"\n\
                 [sites]\nnorth = [\"lyon\"]\nsouth = [\"nice\"]\n\
                 [vms]\nv1 = { weight = 60 }\nv2 = { weight = 50 }\nv3 = { weight = 40 }\n\
                 v4 = { weight = 30 }\nv5 = { weight = 2 }\nv6 = { weight = 1 }\n";
    let Some(mut region) = Region::up("flee", rules, 4.0) else { return };
    for vm in ["v5", "v1", "v6", "v2", "v4", "v3"] {
        region.start("lyon", vm, 96, 0);
    }
    region.until("six guests", |plan| names(&host(plan, "lyon")["vms"]).len() == 6);
    let wish = ["evacuate", "north", "--to", "south", "--deadline", "84s"];
    // What they ask for while they start is thought to be what they change, and who still starts is not
    // promised before one that is at rest.
    let wanted = ["v1", "v2", "v3", "v4"];
    let shown = region.ask_until(&wish, "a promise to four", |said| {
        names(&said["evacuation"]["promised"]) == wanted
    });
    let shown = &shown["evacuation"];
    assert!(names(&shown["left_behind"]).contains(&"v6"), "{shown:#}");
    assert_eq!(region.plan()["evacuation"], Value::Null, "a plan changes nothing");

    let go = [&wish[..], &["--go"]].concat();
    region.fleet.ask("paris", &go).unwrap();
    let again = region.fleet.ask("paris", &go).unwrap_err().to_string();
    assert!(again.contains("is under way already"), "{again}");
    let plan =
        region.until("the first move", |plan| !plan["orders"].as_array().unwrap().is_empty());
    assert_eq!(plan["orders"][0]["vm"], "v1");
    region.fleet.kill("paris").unwrap();
    region.fleet.wait_at("v1", "nice", PATIENCE).unwrap();
    region.fleet.restart(&region.wan, "paris").unwrap();
    let over = region.until("its end", |plan| plan["evacuation"]["is_under_way"] == false);
    let saved = names(&over["evacuation"]["saved"]);
    for vm in wanted {
        assert!(saved.contains(&vm), "{over:#}\n{}", region.fleet.log("paris"));
        region.fleet.wait_at(vm, "nice", PATIENCE).unwrap();
    }
}

/// A profile as the agent keeps it: ten days on which the VM was busy from this hour on, for two hours.
fn busy_for_two_hours(file: &std::path::Path) {
    const SLOTS: i64 = 15 * 288;
    let now = jiff::Timestamp::now().as_second() / 300;
    let mut pairs = vec![[f32::NAN; 2]; SLOTS as usize];
    for back in 1..=10 * 288 {
        // So many slots after this hour, on whichever day.
        let after = (10 * 288 - back) % 288;
        let is_busy = !(24..276).contains(&after);
        pairs[(now - back).rem_euclid(SLOTS) as usize] = [if is_busy { 4.0 } else { 0.1 }, 0.0];
    }
    let mut bytes = b"LHPROF1\0".to_vec();
    bytes.extend((now - 1).to_le_bytes());
    bytes.extend(pairs.into_iter().flatten().flat_map(f32::to_le_bytes));
    std::fs::write(file, bytes).unwrap();
}

/// A guest that was busy at this hour on each of its last days is waited for, its disk goes ahead; one that
/// nobody knows goes at once.
#[test]
fn a_busy_guest_waits_for_its_best_time() {
    let Some(region) = Region::up("best", "link = \"100M\"\n", 1.0) else { return };
    let profiles = region.folder("paris").join("state/profiles");
    busy_for_two_hours(&profiles.join("vm-web"));
    for vm in ["web", "new"] {
        region.start("paris", vm, 96, 0);
    }
    let now = jiff::Timestamp::now();
    let wish = |vm| ["migrate", vm, "--to", "nice", "--best-time", "--deadline", "24h"];
    let said = region.fleet.ask("paris", &wish("web")).unwrap();
    assert!(said["said"].as_str().unwrap().contains("best hour"), "{said}");
    region.fleet.ask("paris", &wish("new")).unwrap();
    region.fleet.wait_at("new", "nice", PATIENCE).unwrap();
    let waits = |status: &Value| status["waiting"][0].clone();
    let status = region.ask_until(&["status"], "a best time", |status| {
        waits(status)["seeded"] == true && waits(status)["best_time"].is_object()
    });
    let best = &waits(&status)["best_time"];
    let starts: jiff::Timestamp = best["starts"].as_str().unwrap().parse().unwrap();
    let after_s = starts.as_second() - now.as_second();
    assert!((5400..9000).contains(&after_s), "{best:#}");
    assert!(best["now_mib"].as_u64() > best["cost_mib"].as_u64(), "{best:#}");
    assert_eq!(best["in_time_percent"], 100, "{best:#}");
    region.fleet.ask("paris", &["cancel", "web"]).unwrap();
    let status = region.fleet.status("paris").unwrap();
    assert!(status["waiting"].as_array().unwrap().is_empty(), "{status:#}");
    assert_eq!(region.fleet.places("web").unwrap(), ["paris"]);
}
