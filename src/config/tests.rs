//! Configurations as operators write them, and the refusals that they read.

use super::*;
use crate::hypervisor::spec::host::{AccelPreference, NetworkBackend};

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("agent.toml"), text, &Overrides::default())
}

fn refusal(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn a_name_is_enough() {
    let config = parse("[agent]\nname = \"paris-1\"\n").unwrap();
    assert_eq!(config.listen, "0.0.0.0:4873".parse().unwrap());
    assert_eq!(config.control_socket(), Path::new("/run/longhaul/control.sock"));
    assert_eq!(config.limits.downtime, Duration::from_millis(300));
    assert_eq!(config.limits.link_patience, Duration::from_secs(300));
    assert_eq!(config.limits.rate, RateCalendar::always(None));
    assert_eq!(config.host.accel, AccelPreference::Auto);
    assert_eq!(config.metrics_listen, None);
}

#[test]
fn everything_is_read() {
    let config = parse(
        r#"
        [agent]
        name = "paris-1"
        listen = "[::]:4000"
        state_dir = "/s"
        run_dir = "/r"
        [qemu]
        system = "/opt/qemu"
        accel = "tcg"
        memory_max = "8G"
        [pools]
        default = "/images"
        fast = "/nvme"
        [networks]
        lan = { bridge = "br0" }
        out = { user = true }
        dark = { none = true }
        direct = { tap_script = "/etc/up", vhost = true }
        [firmware]
        ovmf = "/usr/share/OVMF/OVMF_CODE.fd"
        [limits]
        rate = "08:00-20:00=20M,else=200M"
        time_zone = "UTC"
        memory = "512M"
        downtime_limit_ms = 150
        link_patience_s = 0
        [hooks]
        before_switchover = "/etc/before"
        timeout_s = 5
        [metrics]
        listen = "[::1]:9464"
        "#,
    )
    .unwrap();
    assert_eq!(config.host.pools["fast"], Path::new("/nvme"));
    assert_eq!(config.host.run_dir, Path::new("/r/vm"));
    assert_eq!(config.host.memory_mib_max, 8192);
    let bridge = NetworkBackend::Bridge { bridge: "br0".into(), helper: None };
    assert_eq!(config.host.networks["lan"], bridge);
    let script = PathBuf::from("/etc/up");
    let tap = NetworkBackend::Tap { script, down_script: None, vhost: true };
    assert_eq!(config.host.networks["direct"], tap);
    assert_eq!(config.host.networks["dark"], NetworkBackend::None);
    assert!(config.host.firmware.contains_key("ovmf"));
    assert_eq!(config.limits.memory, ByteCount(512 << 20));
    assert_eq!(config.limits.link_patience, Duration::ZERO);
    assert_eq!(config.limits.rate.to_string(), "08:00-20:00=20M, else=200M");
    assert_eq!(config.limits.time_zone.iana_name(), Some("UTC"));
    assert_eq!(config.hooks.timeout, Duration::from_secs(5));
    assert_eq!(config.hooks.after_switchover, None);
    assert_eq!(config.metrics_listen, "[::1]:9464".parse().ok());
}

#[test]
fn flags_win_over_the_file() {
    let overrides = Overrides { name: Some("lyon".into()), ..Overrides::default() };
    let config = Config::parse(Path::new("f"), "[agent]\nname = \"paris\"", &overrides).unwrap();
    assert_eq!(config.name, "lyon");
    let overrides = Overrides { name: Some("a/b".into()), ..Overrides::default() };
    let error = Config::parse(Path::new("f"), "[agent]\nname = \"paris\"", &overrides);
    assert!(error.unwrap_err().to_string().starts_with("--name: `a/b` is not a name"));
}

#[test]
fn refusals_name_file_line_and_remedy() {
    for (text, expected) in [
        ("[agent]\nnam = \"x\"", "agent.toml:2: unknown field `nam`"),
        ("[agent]\nname = \"../x\"", "agent.toml:2: `../x` is not a name; use up to"),
        ("[agent]\nname = \"x\"\nlisten = \"4873\"", "agent.toml:3: `4873` is not an address"),
        ("[agent]\nname = \"x\"\n[pools]\ndefault = \"disks\"", "agent.toml:4: `disks` is not"),
        ("[agent]\nname = \"x\"\n[limits]\n\nrate = \"fast\"", "agent.toml:5: `fast` is not a cap"),
        ("[agent]\nname = \"x\"\n[limits]\nrate = \"mon=1M\"", "end with else=200M"),
        ("[agent]\nname = \"x\"\n[limits]\ntime_zone = \"Europe/Atlantis\"", "is no time zone"),
        ("[agent]\nname = \"x\"\n[limits]\nmemory = \"1M\"", "agent.toml:4: 1M is too little"),
        ("[agent]\nname = \"x\"\n[limits]\nlink_patience_s = 99999999", "agent.toml:4: 99999999 s"),
        ("[agent]\nname = \"x\"\n[networks]\nlan = { user = true, bridge = \"b\" }", "exactly one"),
        ("[agent]\nname = \"x\"\n[hooks]\ntimeout_s = 0", "agent.toml:4: 0 seconds"),
        (
            "[agent]\nname = \"x\"\n[metrics]\nlisten = \"localhost\"",
            "agent.toml:4: `localhost` is not",
        ),
        ("[agent]\nname = \"x\"\n[metrics]\nport = 1", "agent.toml:4: unknown field `port`"),
        ("[agent]\nname = 5", "agent.toml:2: invalid type"),
        ("", "agent.toml:1: missing field `agent`"),
    ] {
        let refusal = refusal(text);
        assert!(refusal.contains(expected), "{text:?} gave {refusal:?}");
        assert!(refusal.contains(';'), "no remedy in {refusal:?}");
    }
}

#[test]
fn a_missing_file_leads_to_init() {
    let error = Config::load(Path::new("/nonexistent/agent.toml"), &Overrides::default());
    assert!(error.unwrap_err().to_string().contains("`longhaul init`"));
}

#[test]
fn a_planner_is_told_for_whom_and_by_which_rules() {
    let parse_it = |text: &str| parse(&format!("[agent]\nname = \"paris\"\n[scheduler]\n{text}"));
    let rules = parse_it("").unwrap().scheduler;
    assert!(rules.hosts.is_empty() && rules.obeys.is_none() && !rules.acts);
    assert_eq!((rules.interval, rules.marks), (Duration::from_secs(300), (0.8, 0.75)));
    let rules = parse_it(
        "hosts = [\"lyon\"]\nact = true\ninterval_s = 60\nhot_percent = 60\nlink = \"1G\"\ncores = 0.5\n\
         sites = { north = [\"paris\"], south = [\"lyon\"] }\nvms = { db1 = { weight = 8 } }\n",
    );
    let rules = rules.unwrap().scheduler;
    assert_eq!((rules.marks, rules.vms["db1"].weight), ((0.6, 0.55), 8.0));
    for (text, words) in [
        ("sites = { north = [\"nice\"] }", "`nice` of site north is not planned for"),
        ("hosts = [\"a\"]\nsites = { x = [\"a\"], y = [\"a\"] }", "`a` is in two sites"),
        ("hosts = [\"paris\"]", "this host is planned for anyway"),
        ("hot_percent = 70\ncool_percent = 70", "hot from 70 % on cannot be relieved at 70 %"),
        ("hot_percent = 0", "0 % of a host cannot be"),
        ("interval_s = 0", "0 s cannot be"),
        ("cores = -1.0", "-1 cores cannot be"),
        ("link = \"fast\"", "`fast` is not a rate"),
        ("vms = { db1 = { weight = 0.0 } }", "a weight of 0 cannot be"),
        ("vms = { db1 = { wait = 1 } }", "unknown field `wait`"),
    ] {
        let error = parse_it(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}
