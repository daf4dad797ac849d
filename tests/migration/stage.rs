//! The stage of every test: a WAN, an agent at each end, a guest, and what can be asked of them.
//!
//! Invariant: [`Stage::finish`] fails the test if anything of Longhaul's outlives its agents.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_bench::guest::{Guest, Kind};
use longhaul_bench::host::{self, AgentPair, VM};
use longhaul_bench::netns::{self, Side};
use longhaul_bench::profile::Profile;
use longhaul_bench::qmp::Qmp;
use longhaul_bench::wan::{self, Spec, Wan};
use longhaul_bench::watch::Watch;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Generous: the machine may be busy with other things. A cut link alone is noticed after 30 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);
/// How often the agent is asked how far it is.
pub(crate) const LOOK_PERIOD: Duration = Duration::from_millis(20);
/// What may be in flight when something breaks: windows, queues, and what was being applied.
pub(crate) const IN_FLIGHT_BYTES: u64 = 6 << 20;

/// Two cores are enough for one guest that is moved, not for two.
pub(crate) static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Everything that a test needs. Fields are dropped in this order.
pub(crate) struct Stage {
    pub(crate) pair: AgentPair,
    pub(crate) watch: Watch,
    pub(crate) wan: Wan,
    pub(crate) guest: Guest,
    pub(crate) qemu: PathBuf,
    pub(crate) scratch: TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// How a stage is set up.
pub(crate) struct Setting {
    /// Bits per second in each direction.
    pub(crate) rate_mbit: u64,
    /// More of the kernel's command line.
    pub(crate) append: &'static str,
    /// Whether the target has QEMU 7.2 instead of 10.0.
    pub(crate) older_target: bool,
    /// Called with both sides' folders before the agents start.
    pub(crate) before: fn(&[PathBuf; 2]),
}

impl Default for Setting {
    fn default() -> Self {
        Self { rate_mbit: 50, append: "", older_target: false, before: |_| {} }
    }
}

/// The folder of the QEMU that the environment names.
pub(crate) fn qemu(variable: &str) -> Result<PathBuf, String> {
    let program = std::env::var_os(variable)
        .ok_or_else(|| format!("{variable} does not name a qemu-system-x86_64"))?;
    let folder = Path::new(&program).ancestors().nth(2).map(Path::to_owned);
    folder.ok_or_else(|| format!("{variable} is in no folder like QEMU/bin"))
}

/// The lab's own program, beside the product's; built if only the product's was.
pub(crate) fn lab() -> PathBuf {
    if let Some(path) = std::env::var_os(wan::BINARY_VARIABLE) {
        return path.into();
    }
    let lab = Path::new(env!("CARGO_BIN_EXE_longhaul")).with_file_name("lab");
    if !lab.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "longhaul-bench", "--bin", "lab"]);
        assert!(build.status().unwrap().success(), "the lab's program could not be built");
    }
    lab
}

impl Stage {
    /// Sets a stage up without a guest; `None`, and the reason said, where that is not possible.
    pub(crate) fn empty(test: &str, setting: &Setting) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let possible = netns::is_possible().map_err(|error| format!("{error:#}"));
        let qemus = possible.and_then(|()| {
            let newer = qemu("LONGHAUL_QEMU_100")?;
            let target =
                if setting.older_target { qemu("LONGHAUL_QEMU_72")? } else { newer.clone() };
            Ok([newer, target])
        });
        let [source_qemu, target_qemu] = match qemus {
            Ok(qemus) => qemus,
            Err(reason) => {
                eprintln!("SKIPPED {test}: {reason}");
                return None;
            }
        };
        let mut guest = Guest::build(Kind::Tiny).unwrap();
        guest.machine.append = format!("{} {}", guest.machine.append, setting.append);
        // Short: unix sockets lie in it.
        let scratch = tempfile::Builder::new().prefix("lhm-").tempdir().unwrap();
        let folders = Side::BOTH.map(|side| scratch.path().join(side.letter()));
        folders.iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        (setting.before)(&folders);
        let profile = Profile {
            name: "test".to_owned(),
            rate_bits_per_s: setting.rate_mbit * 1_000_000,
            rtt_us: 20_000,
            ..Profile::named("metro").unwrap()
        };
        let name = format!("{test}-{}", std::process::id());
        let spec = Spec { name, profile, seed: 1, stats_file: None };
        let wan = Wan::up(&lab(), spec).unwrap();
        let qemus = [source_qemu.as_path(), target_qemu.as_path()];
        let pair = AgentPair::start(&wan, &folders, qemus, "tcg").unwrap();
        let consoles = Side::BOTH.map(|side| (side, pair.console(side)));
        let watch = Watch::start(scratch.path(), &consoles).unwrap();
        Some(Self { pair, watch, wan, guest, qemu: source_qemu, scratch, _turn: turn })
    }

    /// Sets a stage up and returns once its guest lives at side a.
    pub(crate) fn with_guest(test: &str, setting: &Setting) -> Option<Self> {
        let mut stage = Self::empty(test, setting)?;
        let description = stage.description();
        stage.pair.start_described(&description).unwrap();
        stage.watch.wait_ready(Side::A).unwrap();
        Some(stage)
    }

    /// The guest on a fresh copy of its disk, as the product wants it described.
    pub(crate) fn description(&self) -> Value {
        let disk = self.guest.copy_disk(&self.pair.images(Side::A)).unwrap();
        host::description(&self.guest, &disk).unwrap()
    }

    /// A file or folder of an agent's run folder for the VM.
    pub(crate) fn run_file(&self, side: Side, name: &str) -> PathBuf {
        self.pair.folder(side).join("run/vm").join(VM).join(name)
    }

    /// The guest's disk at one end.
    pub(crate) fn image(&self, side: Side) -> PathBuf {
        self.pair.images(side).join("disk.raw")
    }

    /// Starts a job and gives its number.
    pub(crate) fn begin(&self, deed: &str) -> u64 {
        self.begin_from(Side::A, deed)
    }

    /// As `begin`, from either side to the other.
    pub(crate) fn begin_from(&self, side: Side, deed: &str) -> u64 {
        let to = side.other().letter();
        let started = self.pair.ask(side, &[deed, VM, "--to", to, "--detach"]).unwrap();
        started["started"]["id"].as_u64().unwrap_or_else(|| panic!("no job in {started}"))
    }

    /// Has the agents give a job up when its link is lost.
    pub(crate) fn take_patience(&mut self) {
        let file = self.pair.folder(Side::B).join("agent.toml");
        let mut config: toml::Table = std::fs::read_to_string(&file).unwrap().parse().unwrap();
        let limits = config.entry("limits").or_insert_with(|| toml::Table::new().into());
        limits.as_table_mut().unwrap().insert("link_patience_s".into(), 0.into());
        std::fs::write(&file, config.to_string()).unwrap();
        self.pair.stop(Side::B).unwrap();
        self.pair.restart(&self.wan, Side::B).unwrap();
    }

    /// Waits until the job is in `phase` and has moved something there; gives its progress.
    pub(crate) fn until(&self, job: u64, phase: &str, payload_bytes: u64) -> Value {
        self.until_progress(job, phase, |progress| {
            let is_enough = progress["payload_bytes"].as_u64().unwrap() >= payload_bytes;
            progress["phase"] == phase && is_enough
        })
    }

    /// Waits until the job has cost that much on the wire; gives its progress.
    pub(crate) fn until_sent(&self, job: u64, wire_bytes: u64) -> Value {
        let what = format!("{wire_bytes} bytes on the wire");
        self.until_progress(job, &what, |progress| {
            progress["wire_bytes"].as_u64().unwrap() >= wire_bytes
        })
    }

    /// Waits until the job's progress has a note with these words in it.
    pub(crate) fn until_noted(&self, job: u64, words: &str) {
        self.until_progress(job, words, |progress| {
            progress["note"].as_str().is_some_and(|note| note.contains(words))
        });
    }

    fn until_progress(&self, job: u64, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.pair.status(Side::A).unwrap();
            let progress = status["jobs"]
                .as_array()
                .and_then(|jobs| jobs.iter().find(|running| running["id"] == job))
                .map_or(Value::Null, |running| running["progress"].clone());
            assert!(!progress.is_null(), "job {job} ended before {what}: {status:#}");
            if is_it(&progress) {
                return progress;
            }
            assert!(Instant::now() < deadline, "job {job} does not get to {what}: {progress}");
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Waits for the job's end and says how it was: `{"completed": ..}` or `{"failed": ..}`.
    pub(crate) fn outcome(&self, job: u64) -> Value {
        self.outcome_at(Side::A, job)
    }

    /// Waits until a job runs at this side, and gives its number.
    pub(crate) fn first_job(&self, side: Side) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.pair.status(side).unwrap();
            if let Some(id) = status["jobs"][0]["id"].as_u64() {
                return id;
            }
            assert!(Instant::now() < deadline, "no job starts: {}", self.logs());
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// As `outcome`, of a job of either side.
    pub(crate) fn outcome_at(&self, side: Side, job: u64) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.pair.status(side).unwrap();
            let records = status["recent"].as_array().unwrap();
            if let Some(record) = records.iter().find(|record| record["id"] == job) {
                return record["outcome"].clone();
            }
            assert!(
                Instant::now() < deadline,
                "job {job} does not end: {:#}{}",
                status["jobs"],
                self.logs()
            );
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Moves the guest, which must succeed, and gives the report.
    pub(crate) fn migrate(&self) -> Value {
        let outcome = self.outcome(self.begin("migrate"));
        assert!(outcome["completed"].is_object(), "{outcome:#}{}", self.logs());
        outcome["completed"].clone()
    }

    /// State of the VM in `vm list`; `None` if it is not there.
    pub(crate) fn state(&self, side: Side) -> Option<String> {
        let vms = self.pair.ask(side, &["vm", "list"]).unwrap();
        let vm = vms.as_array().unwrap().iter().find(|vm| vm["name"] == VM)?;
        Some(vm["state"].as_str().unwrap().to_owned())
    }

    /// Waits until nothing is in doubt at one side.
    pub(crate) fn until_settled(&self, side: Side) {
        self.until_in_doubt(side, |doubts| *doubts == json!([]));
    }

    /// Waits until the VM is in an agent's book and runs.
    pub(crate) fn until_running(&self, side: Side) {
        let deadline = Instant::now() + PATIENCE;
        while self.state(side).as_deref() != Some("running") {
            assert!(Instant::now() < deadline, "{:?}{}", self.state(side), self.logs());
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Waits until nothing is in doubt at either side.
    pub(crate) fn until_all_settled(&self) {
        Side::BOTH.iter().for_each(|side| self.until_settled(*side));
    }

    /// Waits until an agent has logged a line with these words in it.
    pub(crate) fn until_logged(&self, side: Side, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        let log = self.pair.folder(side).join("agent.log");
        while !std::fs::read_to_string(&log).unwrap().contains(words) {
            assert!(Instant::now() < deadline, "nothing of {words:?}{}", self.logs());
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Has the agent stop when it gets to a point of the switchover.
    pub(crate) fn arm(&self, side: Side, point: &str) {
        std::fs::create_dir_all(self.pair.points(side)).unwrap();
        std::fs::write(self.pair.points(side).join(point), "").unwrap();
    }

    /// Whether the agent has stopped at a point.
    pub(crate) fn is_at(&self, side: Side, point: &str) -> bool {
        self.pair.points(side).join(format!("{point}.reached")).exists()
    }

    /// Waits until the agent has stopped at a point.
    pub(crate) fn until_at(&self, side: Side, point: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_at(side, point) {
            assert!(Instant::now() < deadline, "{point} is not reached{}", self.logs());
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Lets the agent go on, and no more stop there.
    pub(crate) fn disarm(&self, side: Side, point: &str) {
        let folder = self.pair.points(side);
        for name in [point.to_owned(), format!("{point}.reached")] {
            let _ = std::fs::remove_file(folder.join(name));
        }
    }

    /// Waits until an agent says of its unsettled hand-overs what is wanted.
    pub(crate) fn until_in_doubt(&self, side: Side, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let doubts = self.pair.status(side).unwrap()["in_doubt"].clone();
            if wanted(&doubts) {
                return doubts;
            }
            assert!(Instant::now() < deadline, "it says {doubts:#}{}", self.logs());
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Runs `ask` on the VM's own monitor, for which its agent is stopped and started again: a
    /// monitor has one client.
    pub(crate) fn at_monitor<T>(&mut self, side: Side, ask: impl FnOnce(&mut Qmp) -> T) -> T {
        self.pair.stop(side).unwrap();
        let answer = {
            let mut qmp = Qmp::connect(&self.run_file(side, "qmp.sock")).unwrap();
            ask(&mut qmp)
        };
        self.pair.restart(&self.wan, side).unwrap();
        self.until_settled(side);
        answer
    }

    /// The guest lives at its source, and nothing but itself is in its QEMU or beside it.
    pub(crate) fn assert_untouched(&mut self) {
        self.watch.wait_alive(Side::A).unwrap();
        assert_eq!(self.state(Side::A).as_deref(), Some("running"));
        let left = self.at_monitor(Side::A, left_in_qemu);
        assert_eq!(left, Vec::<String>::new(), "{}", self.logs());
        let folder = self.run_file(Side::A, "");
        assert_eq!(left_in_folder(&folder), Vec::<String>::new());
        self.watch.wait_alive(Side::A).unwrap();
    }

    /// The guest lives at its target, is well, and its source has let go of it.
    pub(crate) fn assert_moved(&mut self) {
        self.watch.wait_alive(Side::B).unwrap();
        assert_eq!(self.state(Side::A), None);
        assert_eq!(self.state(Side::B).as_deref(), Some("running"));
        assert!(!self.run_file(Side::A, "qmp.sock").exists(), "the source's run folder stays");
        let images = files(&self.pair.images(Side::B));
        assert!(!images.iter().any(|name| name.ends_with(".longhaul-incoming")), "{images:?}");
        if !self.guest.machine.append.contains("survivor.idle=1") {
            self.watch.wait_working(Side::B).unwrap();
        }
        self.watch.prove(Side::B).unwrap();
    }

    /// The agents' logs, for messages.
    pub(crate) fn logs(&self) -> String {
        let log = |side: Side| {
            let text = std::fs::read_to_string(self.pair.folder(side).join("agent.log"));
            format!("\n--- agent {} ---\n{}", side.letter(), text.unwrap_or_default())
        };
        format!("{}{}", log(Side::A), log(Side::B))
    }

    /// Powers the guest off at `side` and judges all that it ever said, and its image there.
    pub(crate) fn assert_well(self, side: Side) {
        let image = self.image(side);
        self.finish(side, Some(&image));
    }

    /// Ends everything and looks whether anything of ours is left. Judges the guest, with its disk,
    /// if it is named: it must have been proven before.
    pub(crate) fn finish(mut self, side: Side, image: Option<&Path>) {
        if image.is_some() {
            self.watch.power_off(side).unwrap();
            self.pair.wait_vm_gone(side, PATIENCE).unwrap();
        }
        for side in Side::BOTH {
            let _ = self.pair.ask(side, &["vm", "stop", VM, "--force"]);
            self.pair.stop(side).unwrap();
            let left = processes(&self.wan, side);
            assert_eq!(left, Vec::<String>::new(), "processes at {}", side.letter());
            let run = self.pair.folder(side).join("run");
            assert_eq!(left_in_folder(&run), Vec::<String>::new(), "at {}", side.letter());
        }
        let Self { pair, watch, wan, scratch, .. } = self;
        if let Some(image) = image {
            let verdict = watch.end(side, &[image]).unwrap();
            assert!(verdict.ok, "{:?}\n{:#}", verdict.why, verdict.full);
        }
        let name = wan.spec().name.clone();
        drop((pair, wan));
        for side in Side::BOTH {
            assert!(!netns::namespace_path(&name, side).exists());
        }
        scratch.close().unwrap();
    }
}

/// Makes a folder that has a file system in memory of its own; [`Mounts`] takes it away.
pub(crate) fn mount(folder: &Path, options: &str) {
    std::fs::create_dir_all(folder).unwrap();
    let mount = ["-t", "tmpfs", "-o", options, "longhaul-test"];
    assert!(Command::new("mount").args(mount).arg(folder).status().unwrap().success());
}

/// Folders that are unmounted at the end, also when a test fails.
pub(crate) struct Mounts(pub(crate) Vec<PathBuf>);

impl Drop for Mounts {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = Command::new("umount").arg("--lazy").arg(folder).status();
        }
    }
}

/// Command lines of what runs in a namespace.
pub(crate) fn processes(wan: &Wan, side: Side) -> Vec<String> {
    let name = netns::namespace(&wan.spec().name, side);
    let pids = Command::new("ip").args(["netns", "pids", &name]).output().unwrap();
    String::from_utf8(pids.stdout)
        .unwrap()
        .split_whitespace()
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok())
        .map(|line| line.replace('\0', " "))
        .filter(|line| !line.is_empty())
        .collect()
}

/// Names of the files in a folder, sorted.
pub(crate) fn files(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Sockets of migrations below a folder.
fn left_in_folder(folder: &Path) -> Vec<String> {
    let mut left = Vec::new();
    for name in files(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            left.extend(left_in_folder(&path));
        } else if name == "migration.sock" || name.starts_with("longhaul-") {
            left.push(path.display().to_string());
        }
    }
    left
}

/// What of ours is in a QEMU: bitmaps, exports, a server, a migration; and whether it runs.
pub(crate) fn left_in_qemu(qmp: &mut Qmp) -> Vec<String> {
    let mut left = bitmaps(qmp);
    left.retain(|name| name.starts_with("longhaul-"));
    let mut ask = |command: &str| qmp.execute(command, json!({})).unwrap();
    let exports = ask("query-block-exports");
    left.extend(exports.as_array().unwrap().iter().map(|export| format!("export {export}")));
    let migration = ask("query-migrate")["status"].clone();
    // After a parked guest was resumed QEMU's last word on its migration stays "completed".
    if !["none", "cancelled", "failed", "completed"].map(Value::from).contains(&migration)
        && !migration.is_null()
    {
        left.push(format!("a migration that is {migration}"));
    }
    let status = ask("query-status")["status"].clone();
    if status != "running" {
        left.push(format!("a guest that is {status}"));
    }
    // QEMU does not tell whether a server runs; there must be none to stop.
    if qmp.execute("nbd-server-stop", json!({})).is_ok() {
        left.push("an NBD server".to_owned());
    }
    left
}

/// Names of all dirty bitmaps.
pub(crate) fn bitmaps(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let of = |node: &Value| node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let all = nodes.as_array().unwrap().iter().flat_map(of);
    all.map(|bitmap| bitmap["name"].as_str().unwrap_or_default().to_owned()).collect()
}
