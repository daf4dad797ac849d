//! The binary as a user sees it: what is printed, how it exits, what is left behind.
//!
//! Invariant: agents run below a temporary folder, on loopback and a free port, and are ended by
//! their own process id.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod metrics;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use longhaul_transport::{ConnectError, Endpoint, Fingerprint, Identity, TrustedPeers, Tuning};
use serde_json::Value;
use tempfile::TempDir;

/// Generous: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

fn longhaul() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.env_remove("LONGHAUL_CONFIG").env_remove("LONGHAUL_SOCKET").env_remove("LONGHAUL_LOG");
    command.stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code, stdout, stderr.
fn outcome(output: Output) -> (i32, String, String) {
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Lines that an agent has logged so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Log {
    /// Waits for a line with all of `words` in it.
    fn wait_for(&self, words: &[&str]) -> String {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().unwrap();
        loop {
            if let Some(line) = lines.iter().find(|line| words.iter().all(|w| line.contains(w))) {
                return line.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no line with {words:?} in:\n{}", lines.join("\n"));
            lines = self.more.wait_timeout(lines, left).unwrap().0;
        }
    }
}

/// An agent in a folder of its own.
struct Agent {
    dir: TempDir,
    child: Child,
    log: Arc<Log>,
}

impl Agent {
    fn start(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let init = ["init", "--name", name, "--listen", "127.0.0.1:0", "--dir"];
        let done = longhaul().args(init).arg(dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        let (child, log) = spawn(&dir.path().join("agent.toml"));
        Self { dir, child, log }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("agent.toml")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/control.sock")
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        outcome(longhaul().env("LONGHAUL_CONFIG", self.file()).args(args).output().unwrap())
    }

    fn ok(&self, args: &[&str]) -> String {
        let (code, out, err) = self.run(args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?} printed {out}");
        out
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }

    fn fingerprint(&self) -> String {
        self.json(&["pair"])["fingerprint"].as_str().unwrap().to_owned()
    }

    fn address(&self) -> String {
        self.json(&["pair"])["listen"].as_str().unwrap().to_owned()
    }

    /// Asks it to stop, and returns its exit code.
    fn stop(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Starts an agent and returns once it runs.
fn spawn(file: &Path) -> (Child, Arc<Log>) {
    let mut command = longhaul();
    command.arg("agent").arg("--config").arg(file).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let log = Arc::new(Log::default());
    collect(child.stderr.take().unwrap(), &log);
    log.wait_for(&["agent runs"]);
    (child, log)
}

fn collect(pipe: impl Read + Send + 'static, log: &Arc<Log>) {
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            log.lines.lock().unwrap().push(line);
            log.more.notify_all();
        }
    });
}

#[test]
fn init_writes_once_and_says_what_comes_next() {
    let dir = tempfile::tempdir().unwrap();
    let init = || {
        let args = ["init", "--name", "paris", "--dir"];
        outcome(longhaul().args(args).arg(dir.path()).output().unwrap())
    };
    let (code, out, _) = init();
    assert_eq!(code, 0);
    for words in ["paris is set up", "fingerprint LH-", "longhaul pair", "LONGHAUL_CONFIG="] {
        assert!(out.contains(words), "no `{words}` in {out}");
    }
    let (code, out, err) = init();
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("exists already, nothing was changed"), "{err}");
    let key = dir.path().join("state/identity.key");
    assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn every_help_is_there() {
    let commands = [
        "",
        "init",
        "agent",
        "pair",
        "vm",
        "vm start",
        "vm list",
        "vm show",
        "vm stop",
        "vm adopt",
        "vm forget",
        "vm check",
        "seed",
        "migrate",
        "watch",
        "status",
        "metrics",
        "limit",
        "cancel",
    ];
    for command in commands {
        let words = command.split_whitespace();
        let (code, out, _) = outcome(longhaul().args(words).arg("--help").output().unwrap());
        assert_eq!(code, 0, "{command}");
        assert!(out.contains("Example:") && out.contains("Usage:"), "{command}: {out}");
    }
    let (code, _, err) = outcome(longhaul().arg("migrat").output().unwrap());
    assert_eq!(code, 2);
    assert!(err.contains("migrate"), "no suggestion in {err}");
}

#[test]
fn without_an_agent_the_error_helps() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let (code, out, err) =
        outcome(longhaul().env("LONGHAUL_SOCKET", &socket).arg("status").output().unwrap());
    assert_eq!((code, out.as_str()), (4, ""));
    assert!(err.starts_with("longhaul: no agent answers at "), "{err}");
    assert!(err.contains("next:") && err.contains("`longhaul agent`"), "{err}");

    let json = longhaul().args(["status", "--json", "--socket"]).arg(&socket).output().unwrap();
    let (code, out, err) = outcome(json);
    assert_eq!((code, err.as_str()), (4, ""));
    let failure: Value = serde_json::from_str(&out).unwrap();
    assert!(failure["failed"]["next"].as_str().unwrap().contains("longhaul agent"));

    let missing = dir.path().join("agent.toml");
    let (code, _, err) =
        outcome(longhaul().args(["agent", "--config"]).arg(&missing).output().unwrap());
    assert_eq!(code, 2);
    assert!(err.contains("`longhaul init` writes one"), "{err}");
}

#[test]
fn a_wrong_configuration_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, "[agent]\nname = \"paris\"\nlisen = \"0.0.0.0:1\"\n").unwrap();
    let (code, _, err) =
        outcome(longhaul().args(["agent", "--config"]).arg(&file).output().unwrap());
    assert_eq!(code, 2);
    assert!(err.contains("agent.toml:3: unknown field `lisen`"), "{err}");
}

#[test]
fn an_agent_starts_alone_answers_and_stops() {
    let mut agent = Agent::start("paris");
    let mode = agent.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let second = longhaul().args(["agent", "--config"]).arg(agent.file()).output().unwrap();
    let (code, _, err) = outcome(second);
    assert_eq!(code, 2);
    let pid = agent.child.id().to_string();
    assert!(err.contains("another agent") && err.contains(&pid), "{err}");

    let status = agent.json(&["status"]);
    assert_eq!(status["identity"]["name"], "paris");
    for list in ["vms", "peers", "jobs", "in_doubt", "recent"] {
        assert_eq!(status[list], serde_json::json!([]), "{list}");
    }
    assert!(agent.ok(&["status"]).contains("No VMs yet"));

    let before = agent.fingerprint();
    assert_eq!(agent.stop(), Some(0));
    agent.log.wait_for(&["agent stopped"]);
    assert!(!agent.socket().exists());
    (agent.child, agent.log) = spawn(&agent.file());
    assert_eq!(agent.fingerprint(), before);
}

#[test]
fn caps_are_shown_and_changed_while_the_agent_runs() {
    let mut agent = Agent::start("paris");
    assert_eq!(agent.ok(&["limit"]), "WHAT       NOW        NEXT  AS SET\nthis host  unlimited\n");
    let changed = agent.ok(&["limit", "--rate", "20M"]);
    assert!(changed.contains("this host  20M") && changed.contains("says unlimited"), "{changed}");
    let calendar = "mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M";
    let limits = agent.json(&["limit", "--rate", calendar]);
    assert_eq!(limits["agent"]["set"], calendar);
    assert!(limits["agent"]["next"]["at"].is_string(), "{limits}");
    assert_eq!(limits["configured"], "unlimited");

    let (code, _, err) = agent.run(&["limit", "db1", "--rate", "1M"]);
    assert_eq!(code, 2);
    assert!(err.contains("no job moves db1") && err.contains("next:"), "{err}");
    let (code, _, err) = agent.run(&["limit", "--rate", "08:00-20:00=20M"]);
    assert_eq!(code, 2);
    assert!(err.contains("end with else=200M"), "{err}");
    assert_eq!(agent.json(&["limit"])["agent"]["set"], calendar);

    // A command's cap ends with the agent; the configuration's comes back.
    agent.stop();
    let file = agent.file();
    let text =
        std::fs::read_to_string(&file).unwrap().replace("# rate = \"100M\"", "rate = \"5M\"");
    std::fs::write(&file, text).unwrap();
    (agent.child, agent.log) = spawn(&file);
    let limits = agent.json(&["limit"]);
    assert_eq!((&limits["agent"]["now"], &limits["configured"]), (&"5M".into(), &Value::Null));
}

#[test]
fn two_agents_are_paired_by_fingerprint() {
    let (paris, lyon) = (Agent::start("paris"), Agent::start("lyon"));
    let (address, fingerprint) = (lyon.address(), lyon.fingerprint());
    let shown = lyon.ok(&["pair"]);
    let command = shown.lines().find(|line| line.contains("longhaul pair lyon")).unwrap();
    assert_eq!(command.trim(), format!("longhaul pair lyon {address} {fingerprint}"));

    // Nobody is here to compare, so nobody is trusted; the command to type is shown whole.
    let (code, _, err) = paris.run(&["pair", "lyon", &address]);
    assert_eq!(code, 2);
    assert!(err.contains(&format!("`longhaul pair lyon {address} {fingerprint}`")), "{err}");
    assert_eq!(paris.json(&["pair", "--list"]), serde_json::json!([]));

    // A fingerprint of somebody else is refused, and leaves a trace.
    let other = Fingerprint::from_bytes([7; 32]).to_string();
    let (code, _, err) = paris.run(&["pair", "lyon", &address, &other]);
    assert_eq!(code, 2);
    assert!(err.contains(&format!("is {fingerprint}, not {other}")), "{err}");
    paris.log.wait_for(&["another identity", &other]);
    let (code, _, err) = paris.run(&["pair", "lyon", &address, "LH-1234"]);
    assert_eq!(code, 2);
    assert!(err.contains("not a fingerprint"), "{err}");
    assert_eq!(paris.json(&["pair", "--list"]), serde_json::json!([]));

    let said = paris.ok(&["pair", "lyon", &address, &fingerprint]);
    assert!(said.starts_with(&format!("lyon ({address}) is trusted")), "{said}");
    let peers = paris.json(&["pair", "--list"]);
    assert_eq!(peers[0]["name"], "lyon");
    assert_eq!(peers[0]["fingerprint"], fingerprint.as_str());

    assert!(paris.ok(&["pair", "--remove", "lyon"]).contains("trusted no longer"));
    let (code, _, err) = paris.run(&["pair", "--remove", "lyon"]);
    assert_eq!(code, 2);
    assert!(err.contains("--list"), "{err}");
}

#[tokio::test]
async fn a_stranger_is_refused_logged_and_let_in_once_paired() {
    let paris = Agent::start("paris");
    let home = tempfile::tempdir().unwrap();
    let stranger = Identity::load_or_create(home.path()).unwrap();
    let own = paris.fingerprint().parse().unwrap();
    let trust = Arc::new(TrustedPeers::new([own]));
    let at = "127.0.0.1:0".parse().unwrap();
    let endpoint = Endpoint::bind(at, &stranger, trust, Tuning::default()).unwrap();
    let address = paris.address().parse().unwrap();

    let refused = endpoint.connect(address, own).await;
    assert!(matches!(refused, Err(ConnectError::NotPaired { .. })), "{refused:?}");
    let name = stranger.fingerprint().to_string();
    paris.log.wait_for(&["refused", &name]);

    let here = endpoint.local_addr().to_string();
    paris.ok(&["pair", "lyon", &here, &name]);
    endpoint.connect(address, own).await.unwrap();
    paris.log.wait_for(&["session", "lyon"]);
    endpoint.close().await;
}

#[test]
fn moves_that_cannot_be_are_refused_before_anything_happens() {
    let paris = Agent::start("paris");
    let (code, _, err) = paris.run(&["migrate", "db1", "--to", "lyon"]);
    assert_eq!(code, 2);
    assert!(err.contains("no peer is called `lyon`") && err.contains("next:"), "{err}");
    let nobody = Fingerprint::from_bytes([7; 32]).to_string();
    let said = paris.ok(&["pair", "lyon", "127.0.0.1:9", &nobody]);
    assert!(said.contains("nobody answers there yet"), "{said}");
    for command in ["seed", "migrate"] {
        let (code, _, err) = paris.run(&[command, "db1", "--to", "lyon"]);
        assert_eq!(code, 2);
        assert!(err.contains("no VM of this host is called `db1`"), "{err}");
    }
    for args in [["cancel", "db1"], ["watch", "db1"]] {
        let (code, _, err) = paris.run(&args);
        assert_eq!(code, 2);
        assert!(err.contains("no job moves db1"), "{err}");
    }
}

#[test]
fn another_control_version_is_named_in_one_sentence() {
    let paris = Agent::start("paris");
    let mut stream = UnixStream::connect(paris.socket()).unwrap();
    stream.write_all(b"{\"longhaul\":99,\"body\":{\"fly\":true}}\n").unwrap();
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["longhaul"], 1);
    let what = answer["body"]["response"]["failed"]["what"].as_str().unwrap();
    assert_eq!(what, "this command speaks control version 99, the agent 1");

    // An agent of another version: the command says so, whatever else that agent said.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("new.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let newer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"longhaul\":2,\"something\":\"else\"}\n").unwrap();
    });
    let (code, _, err) =
        outcome(longhaul().arg("--socket").arg(&socket).arg("status").output().unwrap());
    newer.join().unwrap();
    assert_eq!(code, 4);
    assert!(err.contains("control version 1, the agent 2"), "{err}");
}

/// A VM without an operating system: its BIOS looks for one for ever.
const EMPTY_VM: &str = r#"
name = "db1"
machine = "pc-q35-7.2"
vcpus = 1
memory_mib = 64

[cpu]
model = "qemu64"

[[disks]]
id = "system"
location = { pool = "default", file = "db1.raw" }
format = "raw"
bus = "virtio-blk"
"#;

#[test]
fn a_wrong_description_is_refused_with_its_line() {
    let paris = Agent::start("paris");
    let file = paris.dir.path().join("db1.toml");
    let path = file.to_str().unwrap();
    let refusals = [
        (EMPTY_VM.replace("vcpus", "cpus"), "db1.toml:4: unknown field `cpus`"),
        (EMPTY_VM.replace("name = \"db1\"", "name = 5"), "db1.toml:2: invalid type"),
        (EMPTY_VM.replace("pc-q35-7.2", "q35"), "q35"),
        (EMPTY_VM.replace("default", "fast"), "no pool called fast"),
    ];
    for (text, expected) in refusals {
        std::fs::write(&file, text).unwrap();
        let (code, out, err) = paris.run(&["vm", "start", path]);
        assert_eq!((code, out.as_str()), (2, ""), "{err}");
        assert!(err.contains(expected) && err.contains("next:"), "no `{expected}` in {err}");
    }
    let (code, _, err) = paris.run(&["vm", "start", "/nonexistent/db1.toml"]);
    assert_eq!(code, 2);
    assert!(err.contains("cannot read /nonexistent/db1.toml"), "{err}");
    for command in ["start", "show", "stop", "forget"] {
        let (code, _, err) = paris.run(&["vm", command, "db1"]);
        assert_eq!(code, 2);
        assert!(err.contains("no VM of this host is called `db1`"), "{err}");
    }
    std::fs::write(&file, EMPTY_VM.replace("default", "fast")).unwrap();
    let (code, out, _) = paris.run(&["vm", "check", path]);
    assert_eq!(code, 1);
    assert!(out.starts_with("db1 cannot run at this host:\n"), "{out}");
}

/// An agent that runs VMs under the QEMU that `LONGHAUL_QEMU_72` names (see `bench/setup/qemu`).
fn agent_with_qemu(name: &str) -> Option<Agent> {
    let Some(qemu) = std::env::var_os("LONGHAUL_QEMU_72") else {
        eprintln!("SKIPPED: LONGHAUL_QEMU_72 is not set");
        return None;
    };
    let mut agent = Agent::start(name);
    assert_eq!(agent.stop(), Some(0));
    let text = std::fs::read_to_string(agent.file()).unwrap();
    let qemu = format!("[qemu]\nsystem = {qemu:?}\naccel = \"tcg\"\n");
    std::fs::write(agent.file(), text.replace("[qemu]\n", &qemu)).unwrap();
    (agent.child, agent.log) = spawn(&agent.file());
    Some(agent)
}

/// The description of `db1`, whose disk has 4 MiB that nothing makes smaller.
fn described(agent: &Agent) -> PathBuf {
    let file = agent.dir.path().join("db1.toml");
    std::fs::write(&file, EMPTY_VM).unwrap();
    let mut content = vec![0; 4 << 20];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut content).unwrap();
    std::fs::write(agent.dir.path().join("images/db1.raw"), content).unwrap();
    file
}

/// Ends the VM of a test that fails half-way, too. Declared after its agent, dropped before it.
struct EndVm(PathBuf);

impl Drop for EndVm {
    fn drop(&mut self) {
        for args in [&["cancel", "db1"][..], &["vm", "stop", "db1", "--force"]] {
            let _ = longhaul().env("LONGHAUL_CONFIG", &self.0).args(args).output();
        }
    }
}

#[test]
fn a_vm_is_started_found_again_and_stopped() {
    let Some(mut paris) = agent_with_qemu("paris") else { return };
    let file = described(&paris);
    let path = file.to_str().unwrap();
    assert_eq!(paris.ok(&["vm", "check", path]), "db1 can run at this host.\n");
    assert_eq!(paris.ok(&["vm", "start", path]), "db1 runs\n");
    assert_eq!(state(&paris), "running");
    let (code, _, err) = paris.run(&["vm", "start", path]);
    assert_eq!(code, 2);
    assert!(err.contains("db1 runs already"), "{err}");
    let (code, _, err) = paris.run(&["vm", "forget", "db1"]);
    assert_eq!(code, 2);
    assert!(err.contains("`longhaul vm stop db1` first"), "{err}");

    // The guest outlives the agent, and the next agent finds it.
    assert_eq!(paris.stop(), Some(0));
    (paris.child, paris.log) = spawn(&paris.file());
    let end = EndVm(paris.file());
    assert_eq!(state(&paris), "running");

    // What is shown starts an equal VM.
    let shown = paris.json(&["vm", "show", "db1"]);
    std::fs::write(&file, shown["description"].as_str().unwrap()).unwrap();
    assert_eq!(paris.ok(&["vm", "stop", "db1", "--force"]), "db1 is ended\n");
    assert_eq!(state(&paris), "not running");
    assert_eq!(paris.ok(&["vm", "start", path]), "db1 runs\n");
    assert_eq!(paris.json(&["vm", "show", "db1"])["description"], shown["description"]);
    drop(end);
    assert_eq!(paris.ok(&["vm", "start", "db1"]), "db1 runs\n");
    paris.ok(&["vm", "stop", "db1", "--force"]);
    assert!(paris.ok(&["vm", "forget", "db1"]).contains("db1 is forgotten"));
    assert_eq!(paris.json(&["vm", "list"]), serde_json::json!([]));
}

/// Two agents that trust each other; `db1` runs at the first.
fn two_hosts() -> Option<(Agent, Agent)> {
    let (paris, lyon) = (agent_with_qemu("paris")?, agent_with_qemu("lyon")?);
    paris.ok(&["pair", "lyon", &lyon.address(), &lyon.fingerprint()]);
    lyon.ok(&["pair", "paris", &paris.address(), &paris.fingerprint()]);
    let file = described(&paris);
    paris.ok(&["vm", "start", file.to_str().unwrap()]);
    Some((paris, lyon))
}

fn state(agent: &Agent) -> Value {
    agent.json(&["vm", "list"])[0]["state"].clone()
}

/// A command that runs beside the test.
struct Beside {
    child: Child,
    log: Arc<Log>,
}

impl Beside {
    fn start(agent: &Agent, args: &[&str]) -> Self {
        let mut command = longhaul();
        command.env("LONGHAUL_CONFIG", agent.file()).args(args).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        collect(child.stdout.take().unwrap(), &log);
        collect(child.stderr.take().unwrap(), &log);
        Self { child, log }
    }

    fn interrupt(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }

    fn exit_code(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_vm_that_others_started_is_adopted() {
    let Some(mut paris) = agent_with_qemu("paris") else { return };
    described(&paris);
    let (image, socket) =
        (paris.dir.path().join("images/db1.raw"), paris.dir.path().join("db1.qmp"));
    let mut qemu = Command::new(std::env::var_os("LONGHAUL_QEMU_72").unwrap());
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    qemu.args(["-machine", "pc-q35-7.2,accel=tcg", "-cpu", "qemu64", "-m", "64"]);
    qemu.arg("-drive").arg(format!("if=virtio,format=raw,file={}", image.display()));
    qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    let log = Arc::new(Log::default());
    let others = Beside { child: qemu.stdin(Stdio::null()).spawn().unwrap(), log };
    let until = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < until, "QEMU made no socket");
        std::thread::yield_now();
    }

    let path = socket.to_str().unwrap();
    let said = paris.ok(&["vm", "adopt", "--qmp", path]);
    assert!(said.starts_with("db1 is adopted; its description is "), "{said}");
    assert!(!said.contains("Not understood"), "{said}");
    let (code, _, err) = paris.run(&["vm", "adopt", "--qmp", "/nonexistent.qmp"]);
    assert_eq!(code, 2);
    assert!(err.contains("/nonexistent.qmp"), "{err}");

    // The next agent finds it again by its socket, and knows that it is not its own.
    assert_eq!(paris.stop(), Some(0));
    (paris.child, paris.log) = spawn(&paris.file());
    let vms = paris.json(&["vm", "list"]);
    assert_eq!(vms[0]["state"], "running");
    assert_eq!(vms[0]["adopted"], true);
    assert!(paris.ok(&["vm", "forget", "db1"]).contains("were left alone"));
    assert_eq!(paris.json(&["vm", "list"]), serde_json::json!([]));
    drop(others);
}

#[test]
fn a_job_belongs_to_the_agent_until_somebody_cancels_it() {
    let Some((mut paris, _lyon)) = two_hosts() else { return };
    let _end = EndVm(paris.file());
    // At this rate the disk takes minutes: nothing here waits for it.
    let slow = ["seed", "db1", "--to", "lyon", "--rate", "100k"];
    let started = paris.json(&[&slow[..], &["--detach"]].concat());
    assert_eq!(started["started"]["vm"], "db1");
    let (code, _, err) = paris.run(&slow);
    assert_eq!(code, 2);
    assert!(err.contains("a job moves it already (seed to lyon)"), "{err}");
    let (code, _, err) = paris.run(&["vm", "stop", "db1", "--force"]);
    assert_eq!(code, 2);
    assert!(err.contains("`longhaul cancel db1` first"), "{err}");

    // Ctrl-C ends the watching, not the job.
    let watch = Beside::start(&paris, &["watch", "db1", "--json"]);
    let progress: Value = serde_json::from_str(&watch.log.wait_for(&["{\"progress\""])).unwrap();
    assert_eq!(progress["progress"]["phase"], "seed");
    watch.interrupt();
    watch.log.wait_for(&["The job goes on in the agent", "longhaul cancel db1"]);
    assert_eq!(watch.exit_code(), Some(130));
    assert_eq!(paris.json(&["status"])["jobs"][0]["kind"], "seed");
    let values = metrics::parsed(&paris.ok(&["metrics"]));
    let of_job = "{job=\"1\",kind=\"seed\",peer=\"lyon\",vm=\"db1\"}";
    assert!(values.contains_key(&format!("longhaul_job_wire_bytes{of_job}")), "{values:#?}");
    let cap = "longhaul_rate_limit_bytes_per_second{scope=\"job\",vm=\"db1\"}";
    assert_eq!((values[cap], values["longhaul_vms{state=\"running\"}"]), (12_500.0, 1.0));

    // A cancel is seen by everybody who watches, and the guest runs on.
    let watch = Beside::start(&paris, &["watch", "db1"]);
    watch.log.wait_for(&["seed db1 to lyon"]);
    assert!(paris.ok(&["cancel", "db1"]).starts_with("the seed of db1 is cancelled"));
    watch.log.wait_for(&["longhaul: the seed of db1 was cancelled"]);
    watch.log.wait_for(&["state:", "db1"]);
    assert_eq!(watch.exit_code(), Some(5));
    assert_eq!(state(&paris), "running");

    // With --attached, Ctrl-C is a cancel.
    let attached = Beside::start(&paris, &[&slow[..], &["--attached"]].concat());
    attached.log.wait_for(&["seed db1 to lyon"]);
    attached.interrupt();
    assert_eq!(attached.exit_code(), Some(5));

    // An agent that stops takes its jobs down safely, and remembers them.
    paris.json(&[&slow[..], &["--detach"]].concat());
    assert_eq!(paris.stop(), Some(0));
    (paris.child, paris.log) = spawn(&paris.file());
    assert_eq!(state(&paris), "running");
    let recent = paris.json(&["status"])["recent"].clone();
    assert_eq!(recent.as_array().unwrap().len(), 3);
    let what = recent[0]["outcome"]["failed"]["what"].as_str().unwrap();
    assert!(what.contains("because the agent stops"), "{what}");
}

#[test]
fn a_vm_moves_and_its_left_overs_are_not_started() {
    let Some((paris, lyon)) = two_hosts() else { return };
    let (_here, _there) = (EndVm(paris.file()), EndVm(lyon.file()));
    assert_eq!(paris.ok(&["vm", "check", "db1", "--to", "lyon"]), "db1 can move to lyon.\n");
    let (code, out, err) = paris.run(&["seed", "db1", "--to", "lyon"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("db1 is seeded to lyon: "), "{out}");
    let (code, out, err) = paris.run(&["migrate", "db1", "--to", "lyon", "--deadline", "5m"]);
    assert_eq!(code, 0, "{err}");
    for words in ["db1 runs at lyon: ", ", downtime ", "  PHASE ", "  downtime "] {
        assert!(out.contains(words), "no `{words}` in {out}");
    }
    assert!(err.contains("job 2: migrate db1 to lyon"), "{err}");
    assert_eq!(state(&lyon), "running");
    assert_eq!(paris.json(&["vm", "list"]), serde_json::json!([]));
    let recent = paris.json(&["status"])["recent"].clone();
    let completed = &recent[0]["outcome"]["completed"];
    assert_eq!(completed["vm"], "db1");
    let pages = &completed["link"]["classes"][2];
    assert_eq!(pages["class"], "pages");
    assert!(pages["goodput_bits_per_s"].as_u64().unwrap() > 0, "{completed:#}");

    // The counters of both ends know of it.
    let (here, there) = (paris.ok(&["metrics"]), lyon.ok(&["metrics"]));
    let (here, there) = (metrics::parsed(&here), metrics::parsed(&there));
    assert_eq!(here["longhaul_jobs_ended_total{kind=\"migrate\",outcome=\"completed\"}"], 1.0);
    assert!(here["longhaul_migration_downtime_seconds_total"] > 0.0);
    assert!(here["longhaul_last_migration_downtime_seconds{peer=\"lyon\",vm=\"db1\"}"] > 0.0);
    assert!(!here.keys().any(|series| series.starts_with("longhaul_job_")), "{here:#?}");
    // What is with the peer is what it has received, as far as its batches came whole.
    let seed = here["longhaul_link_delivered_bytes_total{class=\"seed\",peer=\"lyon\"}"];
    assert!(seed >= f64::from(4 << 20), "{seed}");
    let received =
        "longhaul_link_payload_bytes_total{class=\"seed\",direction=\"received\",peer=\"paris\"}";
    assert!(there[received] >= seed, "{} of {seed}", there[received]);

    let file = paris.dir.path().join("db1.toml");
    let (code, _, err) = paris.run(&["vm", "start", file.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(err.contains("db1 has moved to another host"), "{err}");
}
