//! A WAN that is up: the process that owns it, how others talk to it, and a guard for harnesses.
//!
//! Invariant: one process owns a WAN's namespaces, devices and files, and takes all of them with it
//! when it is told to, on SIGINT and SIGTERM, and, for a guarded WAN, when its parent is gone. What
//! a killed owner leaves behind is removed by `down` or the next `up` of that name.
//!
//! Control: a unix socket `control` in the WAN's folder. One connection, one line with a word of
//! [`Request`], one line of JSON back.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::netns::{self, Side};
use crate::profile::Profile;
use crate::relay::{self, Relay, Stats};

/// What makes a WAN; the owner reads it from `spec.json` in the WAN's folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name, see [`netns::check_name`].
    pub name: String,
    /// What its links are like.
    pub profile: Profile,
    /// Decides losses and jitter.
    pub seed: u64,
    /// Where the stats go each second and at the end, beside the WAN's own folder.
    pub stats_file: Option<PathBuf>,
}

/// What an owner can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Nothing: how things are.
    Stats,
    /// To lose every packet from now on.
    Cut,
    /// To end a cut.
    Restore,
    /// To remove everything and end.
    Down,
}

impl Request {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Stats, "stats"),
        (Self::Cut, "cut"),
        (Self::Restore, "restore"),
        (Self::Down, "down"),
    ];

    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(request, _)| *request == self).map_or("stats", |(_, word)| word)
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == word).map(|(request, _)| *request)
    }
}

/// How long an owner may take to come up, to answer, to go.
const OWNER_WAIT: Duration = Duration::from_secs(20);
/// How often the stats file is written.
const STATS_PERIOD: Duration = Duration::from_secs(1);
/// Longest control line.
const LINE_BYTES_MAX: u64 = 64 * 1024;
/// The environment's name for the folder that holds a folder for each WAN.
pub const RUN_DIR_VARIABLE: &str = "LONGHAUL_LAB_RUN";
/// The environment's name for the `lab` binary, for harnesses that are another program.
pub const BINARY_VARIABLE: &str = "LONGHAUL_LAB";

/// The folder of the WAN `name`: `spec.json`, `pid`, `control`, `stats.json`, `relay.log`.
pub fn folder(name: &str) -> PathBuf {
    let base = std::env::var_os(RUN_DIR_VARIABLE)
        .map_or_else(|| "/run/longhaul-lab".into(), PathBuf::from);
    base.join(name)
}

/// A WAN that goes when this value goes, or the process that has it.
#[derive(Debug)]
pub struct Wan {
    spec: Spec,
    /// Its standard input is the leash: when it closes, the owner removes everything and ends.
    owner: Child,
}

impl Wan {
    /// Brings a WAN up and waits until packets can pass. `lab` is the lab's own binary; see
    /// [`lab_binary`].
    ///
    /// # Errors
    ///
    /// When a WAN of that name is up, or this host cannot have one; with the owner's words.
    pub fn up(lab: &Path, spec: Spec) -> Result<Self> {
        prepare(&spec)?;
        let owner = start_owner(lab, &spec, Stdio::piped(), Stdio::inherit())?;
        Ok(Self { spec, owner })
    }

    /// What it was made from.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The process that owns the WAN.
    pub fn owner_pid(&self) -> u32 {
        self.owner.id()
    }

    /// What happened so far.
    ///
    /// # Errors
    ///
    /// When the owner does not answer.
    pub fn stats(&self) -> Result<Stats> {
        ask(&self.spec.name, Request::Stats)
    }

    /// Loses every packet from now on, those under way included.
    ///
    /// # Errors
    ///
    /// When the owner does not answer.
    pub fn cut(&self) -> Result<()> {
        ask(&self.spec.name, Request::Cut).map(|_| ())
    }

    /// Ends a cut.
    ///
    /// # Errors
    ///
    /// When the owner does not answer.
    pub fn restore(&self) -> Result<()> {
        ask(&self.spec.name, Request::Restore).map(|_| ())
    }

    /// A command that will run at one end. The process keeps its id, so killing the child kills
    /// the program.
    pub fn command(&self, side: Side, program: impl AsRef<std::ffi::OsStr>) -> Command {
        command(&self.spec.name, side, program)
    }

    /// Runs `work` at one end, see [`netns::inside`].
    ///
    /// # Errors
    ///
    /// When the WAN is gone; else what `work` says.
    pub fn inside<T: Send>(
        &self,
        side: Side,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        netns::inside(&self.spec.name, side, work)
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        drop(self.owner.stdin.take());
        let _ = self.owner.wait();
    }
}

/// See [`Wan::command`].
pub fn command(name: &str, side: Side, program: impl AsRef<std::ffi::OsStr>) -> Command {
    // nsenter (util-linux) enters and then executes in place: no process stays between.
    let mut command = Command::new("nsenter");
    let mut namespace = std::ffi::OsString::from("--net=");
    namespace.push(netns::namespace_path(name, side));
    command.arg(namespace).arg("--").arg(program);
    command
}

/// The `lab` binary for harnesses: `LONGHAUL_LAB`, else this program's own file.
///
/// # Errors
///
/// When this program's file cannot be found.
pub fn lab_binary() -> Result<PathBuf> {
    match std::env::var_os(BINARY_VARIABLE) {
        Some(path) => Ok(path.into()),
        None => std::env::current_exe().context("while looking for the lab's own binary"),
    }
}

/// Brings a WAN up that stays until `down`, and gives its owner's process id.
///
/// # Errors
///
/// As [`Wan::up`].
pub fn up_in_background(lab: &Path, spec: &Spec) -> Result<u32> {
    prepare(spec)?;
    let log_path = folder(&spec.name).join("relay.log");
    let log = fs::File::create(&log_path)
        .with_context(|| format!("while creating {}", log_path.display()))?;
    start_owner(lab, spec, Stdio::null(), log.into()).map(|owner| owner.id()).with_context(|| {
        format!("the relay's own words: {}", fs::read_to_string(&log_path).unwrap_or_default())
    })
}

/// Takes a WAN down whoever brought it up; also what a killed owner left behind.
///
/// # Errors
///
/// When the owner lives but does not go.
pub fn down(name: &str) -> Result<()> {
    netns::check_name(name)?;
    let dir = folder(name);
    match ask(name, Request::Down) {
        Ok(_) => {
            let deadline = Instant::now() + OWNER_WAIT;
            while dir.exists() {
                ensure!(
                    Instant::now() < deadline,
                    "the WAN {name} does not go: see {}",
                    dir.join("relay.log").display()
                );
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        }
        Err(_) => remove_leftovers(name),
    }
}

/// Asks the owner of the WAN `name`; every answer has the stats.
///
/// # Errors
///
/// When that WAN is not up or its owner does not answer.
pub fn ask(name: &str, request: Request) -> Result<Stats> {
    netns::check_name(name)?;
    let path = folder(name).join("control");
    let mut stream = UnixStream::connect(&path)
        .with_context(|| format!("the WAN {name} is not up: {} does not answer", path.display()))?;
    stream.set_read_timeout(Some(OWNER_WAIT))?;
    writeln!(stream, "{}", request.word())?;
    let mut line = String::new();
    BufReader::new(std::io::Read::take(stream, LINE_BYTES_MAX))
        .read_line(&mut line)
        .with_context(|| format!("while asking the owner of the WAN {name}"))?;
    serde_json::from_str(&line).with_context(|| format!("the WAN {name} answered {line:?}"))
}

/// Makes the WAN's folder with its specification; what a dead owner left is removed first.
fn prepare(spec: &Spec) -> Result<()> {
    netns::check_name(&spec.name)?;
    let dir = folder(&spec.name);
    ensure!(
        UnixStream::connect(dir.join("control")).is_err(),
        "the WAN {0} is up already: `lab wan down --name {0}` removes it",
        spec.name
    );
    remove_leftovers(&spec.name)?;
    fs::create_dir_all(&dir).with_context(|| format!("while creating {}", dir.display()))?;
    let path = dir.join("spec.json");
    fs::write(&path, serde_json::to_vec_pretty(spec)?)
        .with_context(|| format!("while writing {}", path.display()))
}

fn remove_leftovers(name: &str) -> Result<()> {
    netns::remove(name);
    let dir = folder(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("while removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Starts the owner and waits for its word `ready`.
fn start_owner(lab: &Path, spec: &Spec, stdin: Stdio, stderr: Stdio) -> Result<Child> {
    let mut owner = Command::new(lab)
        .args(["wan", "own", "--name", &spec.name])
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("while starting {}", lab.display()))?;
    let mut line = String::new();
    if let Some(stdout) = owner.stdout.take() {
        // The end of the output means that the owner failed and said why on stderr.
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line.trim() != "ready" {
        drop(owner.stdin.take());
        let status = owner.wait()?;
        bail!("the WAN {} did not come up: its relay ended with {status}", spec.name);
    }
    Ok(owner)
}

/// What the WAN `name`, which is up, was made from.
///
/// # Errors
///
/// When it is not up.
pub fn spec(name: &str) -> Result<Spec> {
    netns::check_name(name)?;
    let path = folder(name).join("spec.json");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("while reading {}: is the WAN {name} up?", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))
}

/// Runs the WAN `name`, whose folder was prepared, until it is told to end or its standard input
/// ends (unless that is /dev/null). Prints `ready` once packets can pass.
///
/// # Errors
///
/// When the namespaces, devices or files cannot be made. Whatever was made is removed.
pub fn own(name: &str) -> Result<()> {
    // A session of its own: a Ctrl-C at the terminal is for the harness, which lets go of the leash
    // when it is done. And where the kernel groups processes by session (autogroup), the relay's
    // priority counts only among its session's, so the session is given the same one.
    let _ = rustix::process::setsid();
    let _ = fs::write("/proc/self/autogroup", relay::NICE.to_string());
    let is_leashed = fs::read_link("/proc/self/fd/0").is_ok_and(|path| path != *"/dev/null");
    own_until(name, is_leashed)
}

fn own_until(name: &str, is_leashed: bool) -> Result<()> {
    let dir = folder(name);
    let spec = spec(name)?;
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("while starting the relay's control loop")?
        .block_on(serve(&spec, &dir, is_leashed));
    let _ = fs::remove_dir_all(&dir);
    result
}

/// Runs a WAN in the foreground: everything of `lab wan up` in one process.
///
/// # Errors
///
/// As [`own`].
pub fn own_in_foreground(spec: &Spec) -> Result<()> {
    prepare(spec)?;
    own_until(&spec.name, false)
}

async fn serve(spec: &Spec, dir: &Path, is_leashed: bool) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    fs::write(dir.join("pid"), std::process::id().to_string())?;
    let (pair, devices) = netns::Pair::create(&spec.name, &spec.profile)?;
    let relay = Relay::start(&spec.name, &spec.profile, spec.seed, devices)?;
    let listener =
        UnixListener::bind(dir.join("control")).context("while opening the control socket")?;
    println!("ready");
    let mut leash = tokio::spawn(watch_leash(is_leashed));
    let mut tick = tokio::time::interval(STATS_PERIOD);
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = &mut leash => break,
            _ = tick.tick() => write_stats(spec, dir, &relay.stats()),
            connection = listener.accept() => {
                let Ok((stream, _)) = connection else { continue };
                // One at a time: control is rare, and answers are immediate.
                let answer = tokio::time::timeout(OWNER_WAIT, answer(stream, &relay)).await;
                if matches!(answer, Ok(Ok(Request::Down))) {
                    break;
                }
            }
        }
    }
    let last = relay.stats();
    drop(relay);
    write_stats(spec, dir, &last);
    drop(pair);
    Ok(())
}

async fn answer(mut stream: tokio::net::UnixStream, relay: &Relay) -> Result<Request> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    tokio::io::BufReader::new(read.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    let request = Request::parse(line.trim());
    match request {
        Some(Request::Cut) => relay.cut(),
        Some(Request::Restore) => relay.restore(),
        _ => {}
    }
    let mut reply = serde_json::to_vec(&relay.stats())?;
    reply.push(b'\n');
    write.write_all(&reply).await?;
    request.with_context(|| format!("{line:?} is no request"))
}

/// Returns when standard input ends, for a leashed owner.
async fn watch_leash(is_leashed: bool) {
    if !is_leashed {
        return std::future::pending().await;
    }
    let (gone, is_gone) = tokio::sync::oneshot::channel::<()>();
    // A thread, not tokio's stdin: that one would hold the runtime's shutdown for a last read.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        drop(gone);
    });
    let _ = is_gone.await;
}

/// Replaces the stats files whole, so that a reader never sees half of one.
fn write_stats(spec: &Spec, dir: &Path, stats: &Stats) {
    let own = dir.join("stats.json");
    for path in std::iter::once(&own).chain(&spec.stats_file) {
        let part = path.with_extension("json.part");
        let written = serde_json::to_vec_pretty(stats)
            .map_err(std::io::Error::from)
            .and_then(|bytes| fs::write(&part, bytes))
            .and_then(|()| fs::rename(&part, path));
        if let Err(error) = written {
            eprintln!("lab: the stats were not written to {}: {error}", path.display());
        }
    }
}
