//! What can be typed.
//!
//! Invariant: every command's help ends with an example that works as it stands, apart from names.
//! Amounts are parsed here, so a wrong one is a usage error and nothing was attempted.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::calendar::{CalendarError, RateCalendar, Windows};
use crate::control::ImageName;
use crate::units::parse_duration;

/// Exit codes, as they are documented in the help.
const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed, safely: a guest that ran runs on where it was
  2    refused: the command or a file is wrong, nothing was attempted
  3    in doubt: which side may run the VM has to be found out (`longhaul status`)
  4    no agent answers on this host
  5    cancelled: the guest runs on where it was
  130  Ctrl-C: this command stopped watching, the job goes on in the agent

Example:
  longhaul init && longhaul agent &
  longhaul pair lyon 203.0.113.7:4873
  longhaul migrate db1 --to lyon";

/// Moves running virtual machines between data centres over the public internet.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, subcommand_required = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The agent's configuration [default: /etc/longhaul/agent.toml]
    #[arg(
        long,
        global = true,
        env = "LONGHAUL_CONFIG",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub config: Option<PathBuf>,
    /// The agent's socket [default: as the configuration says, else /run/longhaul/control.sock]
    #[arg(
        long,
        global = true,
        env = "LONGHAUL_SOCKET",
        value_name = "PATH",
        hide_env_values = true
    )]
    pub socket: Option<PathBuf>,
    /// Print JSON: one document per line
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a configuration and create this host's identity
    #[command(after_help = "\
Nothing that exists is overwritten. With --dir everything lies below one folder, which is handy to
try two agents on one host.

Example:
  longhaul init --name paris")]
    Init(InitArgs),
    /// Run this host's agent in the foreground
    #[command(after_help = "\
SIGTERM and Ctrl-C stop it gracefully: running jobs are aborted safely and guests run on. Guests do
not stop with the agent; the next one finds them again.

Logs go to stderr; LONGHAUL_LOG sets their level (error, warn, info, debug, trace).

As a systemd service; without KillMode=process systemd would end the guests with their agent:
  [Service]
  ExecStart=/usr/local/bin/longhaul agent
  KillMode=process
  TimeoutStopSec=90
  Restart=on-failure
  RestartPreventExitStatus=2

Example:
  longhaul agent --config /etc/longhaul/agent.toml")]
    Agent(AgentArgs),
    /// Show who this host is, or trust a peer
    #[command(after_help = "\
Both hosts must trust each other: run `longhaul pair` on each, and type what it shows on the other.
Without FINGERPRINT the one that answers at ADDRESS is shown and asked about: compare it with what
the other host's `longhaul pair` shows before you say yes.

Example:
  longhaul pair                                # who am I
  longhaul pair lyon 203.0.113.7:4873 LH-4Q2A-...
  longhaul pair --list")]
    Pair(PairArgs),
    /// Start, stop, show and check the VMs of this host
    #[command(subcommand, after_help = "Example:\n  longhaul vm start db1.toml")]
    Vm(VmCommand),
    /// Send a VM's disks ahead of time, while it runs
    #[command(after_help = "\
A seed can be stopped at any time and started again: what has arrived stays and is not sent twice.
With --background it yields to other traffic on the link. From then on the VM's writes are tracked,
so that the next seed or migration sends only those; --forget ends that.

Example:
  longhaul seed db1 --to lyon --rate 20M
  longhaul seed db1 --to lyon --background
  longhaul seed db1 --forget")]
    Seed(SeedArgs),
    /// Move a running VM to a peer
    #[command(after_help = "\
Until the hand-over any failure leaves the guest running here. The job belongs to the agent: Ctrl-C
or a lost terminal ends this command, not the migration; `longhaul watch` follows it again and
`longhaul cancel` stops it. With --attached, Ctrl-C cancels the migration instead.

With --window it waits: in the window the disks go ahead, then the VM; when the window closes it pauses,
and goes on in the next one without sending twice. `longhaul status` shows what waits.

With --best-time the disks go ahead at once, yielding to others, and the VM follows when it writes little
and the link is free, by what both did in the last two weeks; in time for the deadline if that can be. A VM
that was not watched for a day goes at once.

Example:
  longhaul migrate db1 --to lyon --downtime-limit 300ms --deadline 2h
  longhaul migrate db1 --to lyon --best-time --deadline 24h
  longhaul migrate db1 --to lyon --window \"22:00-06:00\" --rate 20M")]
    Migrate(MigrateArgs),
    /// Send an image to a peer's pool, without a VM
    #[command(after_help = "\
IMAGE is a raw image, or a qcow2 if its name ends in .qcow2; one that a QEMU has open is refused. It
arrives in the peer's pool `default`, or in POOL, under NAME, and has that name only once it is there
whole, verified and durable. What the peer has of it is not sent: an earlier image of that name, which
is replaced only with --replace, other images with a record, an earlier push that was cut.

The job belongs to the agent and goes by the image's path: `longhaul watch` and `longhaul cancel`
take that.

Example:
  longhaul push /srv/golden.raw lyon:golden.raw
  longhaul push /srv/golden.raw lyon:golden.raw --replace --rate 50M
  longhaul push db1.qcow2 lyon:fast/db1.qcow2")]
    Push(PushArgs),
    /// Fetch a disk image from a peer
    #[command(after_help = "\
The peer sends any image of its pools that no QEMU has open to the hosts that its operator has named
(agent.serves in its configuration), as if `longhaul push` had been typed there: what is here already
is not sent, a pull that was broken off goes on where it was, and until all is here and checked there
is no image of that name. Watch it and cancel it by PEER:POOL/NAME.

Example:
  longhaul pull lyon:golden.raw
  longhaul pull lyon:fast/db1.raw fast/db1-copy.raw --replace --rate 50M")]
    Pull(PullArgs),
    /// Follow the job that moves a VM
    #[command(after_help = "\
The exit code is that of the job, as if it had been started by this command.

Example:
  longhaul watch db1")]
    Watch(VmName),
    /// Show VMs, jobs, peers and hand-overs in doubt
    #[command(after_help = "\
Example:
  longhaul status
  longhaul status --json | jq '.jobs[].progress.payload_bytes'")]
    Status,
    /// Print the agent's numbers once, for Prometheus
    #[command(after_help = "\
The numbers are in Prometheus' text format, for node_exporter's textfile collector or a script;
with --json as documents. Counters count from the agent's start. For Prometheus to scrape the agent
itself set metrics.listen in the configuration; docs/operating.md lists what there is.

Example:
  longhaul metrics > /var/lib/node_exporter/longhaul.new &&
    mv /var/lib/node_exporter/longhaul.new /var/lib/node_exporter/longhaul.prom
  longhaul metrics | grep unsettled")]
    Metrics,
    /// Show or change how fast may be sent
    #[command(after_help = "\
Without --rate and --class the caps that hold now are shown, and what comes next. With a VM its job
is meant, else all that this host sends. A cap is in bits per second (20M, 1G), \"unlimited\", or a
calendar: windows of the day, the week or both, of which the first that fits decides, and what
holds else. Times are those of limits.time_zone in the configuration, or of this host.

The lowest cap holds: of this host, of the job, of the class. A change holds at once. A job's caps
end with the job; this host's cap is again what the configuration says when the agent is
restarted. The hand-over itself never waits.

Example:
  longhaul limit                                              # what holds now
  longhaul limit --rate 50M
  longhaul limit --rate \"mon-fri 08:00-20:00=20M, sat,sun=unlimited, else=200M\"
  longhaul limit db1 --rate unlimited --class seed=20M")]
    Limit(LimitArgs),
    /// Show, build or check the index of what the images here hold
    #[command(after_help = "\
What an arriving disk has in common with images in this host's pools is copied from them instead of
being sent. The index says where to look. Images that Longhaul wrote or sent go into it by themselves;
`build` takes in any other raw image, by reading it once: one that did not change is not read again.
`check` reads the index and leaves out what is damaged; `build` then reads the images in question.

Example:
  longhaul index                    # what it tells of, and how much is stale
  longhaul index build              # all pools
  longhaul index build default /var/lib/longhaul/images/db1.raw
  longhaul index check")]
    Index(IndexArgs),
    /// Compare an image with the record of what was written to it
    #[command(after_help = "\
Images that Longhaul wrote, sent or received have a record beside them, IMAGE.longhaul-recipe, with the
hash of every piece. `verify` reads the image and names what differs. If nobody wrote to the image since
its record was completed, that is damage, and the command fails.

Example:
  longhaul verify /var/lib/longhaul/images/db1.raw")]
    Verify(VerifyArgs),
    /// Look after what lies in this host's pools
    #[command(subcommand, after_help = "Example:\n  longhaul store gc")]
    Store(StoreCommand),
    /// Stop the job that moves a VM; the guest runs on here
    #[command(after_help = "\
What the target has received stays there, so the next try is short.

Example:
  longhaul cancel db1")]
    Cancel(VmName),
    /// Show what the planner sees, plans and has ordered
    #[command(after_help = "\
One agent plans for the hosts that its configuration names (scheduler.hosts). Each host must obey it
(scheduler.obeys in its own). The plan says why a VM moves and why a host is left as it is. With
scheduler.act moves against hot hosts are made; otherwise they are only shown.

Each plan that moves something is recorded with all that it was made of; --replay makes it anew.

Example:
  longhaul plan --explain
  longhaul plan --replay /var/lib/longhaul/plans.jsonl")]
    Plan(PlanArgs),
    /// Empty a host for maintenance, one VM after the other
    #[command(after_help = "\
Without --go nothing is changed: the moves are shown. From --go on the host takes no VM, and its VMs
move to where they add least, also without scheduler.act; --undo ends that.

Example:
  longhaul drain lyon          # what would move
  longhaul drain lyon --go
  longhaul drain lyon --undo")]
    Drain(DrainArgs),
    /// Empty a site before a deadline, the most valuable VMs first
    #[command(after_help = "\
Without --go nothing is changed: it is shown which VMs would go, in which order, which of them are
promised, and which will not make it. Sites and weights stand in the planner's configuration
(scheduler.sites, scheduler.vms).

Example:
  longhaul evacuate north --to south --deadline 2h
  longhaul evacuate north --to south --deadline 2h --go
  longhaul evacuate north --stop")]
    Evacuate(EvacuateArgs),
    /// Decide where a VM runs whose hand-over is in doubt
    #[command(after_help = "\
Without --runs nothing is decided: what this side knows is shown, and what each decision risks.

Both agents settle a hand-over in doubt by themselves as soon as they reach each other. Decide only if
the other side is gone for good, or you know what holds there. The other side is asked once more
first, and its answer counts; then the `fence` hook runs, if there is one. The decision is written to
the journal before it is followed. Should the two journals meet later and disagree, the VM at the
target is stopped and both agents say so.

Example:
  longhaul resolve db1                # what is known
  longhaul resolve db1 --runs here    # asks for the VM's name to confirm")]
    Resolve(ResolveArgs),
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Show the forecasts that the plan rests on
    #[arg(long)]
    pub explain: bool,
    /// Make the recorded plans of this file anew and compare
    #[arg(long, value_name = "FILE", conflicts_with = "explain")]
    pub replay: Option<PathBuf>,
}

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The host, by its name at the planner
    pub host: String,
    /// Do it
    #[arg(long, conflicts_with = "undo")]
    pub go: bool,
    /// The host takes VMs again
    #[arg(long)]
    pub undo: bool,
}

/// Arguments of `evacuate`.
#[derive(Debug, Args)]
pub struct EvacuateArgs {
    /// The site that is emptied
    pub site: String,
    /// The site that its VMs go to
    #[arg(long, value_name = "SITE", required_unless_present = "stop")]
    pub to: Option<String>,
    /// The site is gone after this time, e.g. 2h
    #[arg(long, value_name = "TIME", value_parser = parse_duration, required_unless_present = "stop")]
    pub deadline: Option<Duration>,
    /// Do it
    #[arg(long, conflicts_with = "stop")]
    pub go: bool,
    /// End the evacuation that is under way; what moves, moves on
    #[arg(long, conflicts_with_all = ["to", "deadline"])]
    pub stop: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The image, by its path on this host
    pub image: PathBuf,
}

/// Commands about pools.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show, and with --go remove, what is of no use any more
    #[command(after_help = "\
That is images that a push or pull began and nobody has finished (NAME.longhaul-part), and records of
images that are gone. An image that has its name is never touched, nor a disk that was seeded and waits
for its VM: `longhaul seed VM --forget` at its source ends that, and the file is then yours to remove.

Example:
  longhaul store gc
  longhaul store gc --older 30d --go")]
    Gc(GcArgs),
}

/// Arguments of `store gc`.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Only what nothing was written to for this long; at least 25h
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = parse_duration)]
    pub older: Duration,
    /// Remove it
    #[arg(long)]
    pub go: bool,
}

/// Arguments of `index`.
#[derive(Debug, Args)]
pub struct IndexArgs {
    /// What to do; without it the index is shown.
    #[command(subcommand)]
    pub command: Option<IndexCommand>,
}

/// Commands about the index.
#[derive(Debug, Subcommand)]
pub enum IndexCommand {
    /// Take images in that it does not know as they are, and drop those that are gone
    #[command(after_help = "Example:\n  longhaul index build default")]
    Build {
        /// Pools by name or images by path [default: all pools]
        #[arg(value_name = "POOL|IMAGE")]
        subjects: Vec<String>,
    },
    /// Read all of it and leave out what is damaged
    #[command(after_help = "Example:\n  longhaul index check")]
    Check,
}

/// Arguments of `resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// The VM
    pub vm: String,
    /// Where it is to run: on this host, or at the other side
    #[arg(long, value_enum, value_name = "WHERE")]
    pub runs: Option<Runs>,
    /// The VM's name once more, for scripts; without it you are asked to type it
    #[arg(long, value_name = "VM", requires = "runs")]
    pub confirm: Option<String>,
}

/// Where a VM is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Runs {
    /// On this host.
    Here,
    /// At the other side.
    There,
}

/// Arguments of `limit`.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// The VM whose job is meant
    pub vm: Option<String>,
    /// The new cap
    #[arg(long, value_name = "CAP")]
    pub rate: Option<RateCalendar>,
    /// A new cap for a class of what the job sends: seed, blocks, pages or device-state
    #[arg(long, value_name = "CLASS=CAP", value_parser = parse_class_cap, requires = "vm")]
    pub class: Vec<(String, RateCalendar)>,
}

fn parse_class_cap(text: &str) -> Result<(String, RateCalendar), String> {
    let Some((class, cap)) = text.split_once('=') else {
        return Err("write it as in seed=20M".to_owned());
    };
    let cap = cap.parse().map_err(|error: CalendarError| error.to_string())?;
    Ok((class.trim().to_owned(), cap))
}

/// Arguments of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Put configuration, state, sockets and images below this folder
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// This host's name, as peers will show it [default: the host name]
    #[arg(long)]
    pub name: Option<String>,
    /// UDP address for peers
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:4873")]
    pub listen: SocketAddr,
}

/// Arguments of `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Replaces agent.name
    #[arg(long)]
    pub name: Option<String>,
    /// Replaces agent.listen
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Replaces agent.state_dir
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Replaces agent.run_dir
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// How log lines look
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON document per line.
    Json,
}

/// Arguments of `pair`.
#[derive(Debug, Args)]
pub struct PairArgs {
    /// Name for the peer at this host
    #[arg(requires = "address")]
    pub name: Option<String>,
    /// Where it is reached: host:port, or a host alone for port 4873
    pub address: Option<String>,
    /// Its fingerprint, as its own `longhaul pair` shows it
    pub fingerprint: Option<String>,
    /// List the peers
    #[arg(long, conflicts_with_all = ["name", "remove"])]
    pub list: bool,
    /// Trust this peer no longer
    #[arg(long, value_name = "NAME", conflicts_with = "name")]
    pub remove: Option<String>,
}

/// Commands about VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a VM from its description, or one that was started before
    #[command(after_help = "Example:\n  longhaul vm start db1.toml\n  longhaul vm start db1")]
    Start {
        /// A description (a path with a `/` or ending in .toml) or the name of a VM
        #[arg(value_name = "FILE|NAME")]
        subject: String,
    },
    /// List the VMs of this host
    #[command(after_help = "Example:\n  longhaul vm list")]
    List,
    /// Show a VM and its description
    #[command(after_help = "\
Example:
  longhaul vm show db1
  longhaul vm show db1 --json | jq -r .description > db1.toml")]
    Show(VmName),
    /// Shut a VM down
    #[command(after_help = "\
The guest is asked to power off; --force ends its process at once. Its description stays known until
the process is gone.

Example:
  longhaul vm stop db1")]
    Stop {
        /// The VM
        vm: String,
        /// End the process at once, like pulling the plug
        #[arg(long)]
        force: bool,
    },
    /// Take a VM out of the agent's book; its process and images are left alone
    #[command(after_help = "Example:\n  longhaul vm forget db1")]
    Forget(VmName),
    /// Take over a running QEMU that something else started
    #[command(after_help = "\
The VM is not touched: it is read through QMP and described in a file. What the description cannot
hold is printed; such a VM may still run here, but cannot be built again at another host.

The QMP socket must be free: QEMU serves one client per socket, so give it a second one
(-qmp unix:/run/db1.qmp,server=on,wait=off).

Example:
  longhaul vm adopt --qmp /run/db1.qmp --name db1")]
    Adopt {
        /// A QMP socket of the VM
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// Name for the VM [default: that of the socket's file]
        #[arg(long)]
        name: Option<String>,
    },
    /// Tell whether a VM can start here, or move to a peer
    #[command(after_help = "\
Example:
  longhaul vm check db1.toml
  longhaul vm check db1 --to lyon")]
    Check {
        /// A description (a path with a `/` or ending in .toml) or the name of a VM
        #[arg(value_name = "FILE|NAME")]
        subject: String,
        /// Ask this peer whether it can take the VM
        #[arg(long, value_name = "PEER")]
        to: Option<String>,
    },
}

/// A VM.
#[derive(Debug, Args)]
pub struct VmName {
    /// The VM
    pub vm: String,
}

/// What seeds and migrations have in common.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// Send at most this fast: bits per second, e.g. 20M, or a calendar as `limit` takes it
    #[arg(long, value_name = "CAP")]
    pub rate: Option<RateCalendar>,
    /// Give up after this time, e.g. 30m or 2h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub deadline: Option<Duration>,
    /// Return as soon as the job is admitted
    #[arg(long, conflicts_with = "attached")]
    pub detach: bool,
    /// Ctrl-C cancels the job instead of leaving it to the agent
    #[arg(long)]
    pub attached: bool,
}

/// Arguments of `seed`.
#[derive(Debug, Args)]
pub struct SeedArgs {
    /// The VM
    pub vm: String,
    /// The peer
    #[arg(long, value_name = "PEER", required_unless_present = "forget")]
    pub to: Option<String>,
    /// Stop tracking what the VM writes since its last seed; what lies at the peer stays there
    #[arg(long, conflicts_with_all = ["to", "background", "rate", "deadline", "detach", "attached"])]
    pub forget: bool,
    /// Take only what others leave of the link: for what nobody waits for
    #[arg(long)]
    pub background: bool,
    /// How.
    #[command(flatten)]
    pub how: MoveArgs,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM
    pub vm: String,
    /// The peer
    #[arg(long, value_name = "PEER")]
    pub to: String,
    /// Downtime that it may take [default: limits.downtime_limit_ms, 300ms]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// Move only then, e.g. "22:00-06:00" or "mon-fri 22:00-06:00; sat,sun"
    #[arg(long, value_name = "TIMES", conflicts_with = "attached")]
    pub window: Option<Windows>,
    /// Move in the hour before the deadline in which least of the VM crosses twice
    #[arg(long, requires = "deadline", conflicts_with = "attached")]
    pub best_time: bool,
    /// How.
    #[command(flatten)]
    pub how: MoveArgs,
}

/// Arguments of `push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    /// The image's file
    pub image: PathBuf,
    /// The peer, and the image's name there
    #[arg(value_name = "PEER:[POOL/]NAME", value_parser = parse_place)]
    pub to: Place,
    /// Replace an image of that name
    #[arg(long)]
    pub replace: bool,
    /// Take only what others leave of the link: for what nobody waits for
    #[arg(long)]
    pub background: bool,
    /// How.
    #[command(flatten)]
    pub how: MoveArgs,
}

/// Arguments of `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The peer, and the image there
    #[arg(value_name = "PEER:[POOL/]NAME", value_parser = parse_place)]
    pub image: Place,
    /// What it is to be here; the same name in the pool `default` if absent
    #[arg(value_name = "[POOL/]NAME", value_parser = parse_image_name)]
    pub to: Option<ImageName>,
    /// Replace an image of that name
    #[arg(long)]
    pub replace: bool,
    /// Take only what others leave of the link: for what nobody waits for
    #[arg(long)]
    pub background: bool,
    /// How.
    #[command(flatten)]
    pub how: MoveArgs,
}

/// An image's place at a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The peer.
    pub peer: String,
    /// The image there.
    pub image: ImageName,
}

/// The pool that is meant where none is named.
pub(super) const DEFAULT_POOL: &str = "default";

fn parse_place(text: &str) -> Result<Place, String> {
    let place = text.split_once(':').filter(|(peer, _)| !peer.is_empty());
    let place = place.and_then(|(peer, name)| {
        Some(Place { peer: peer.to_owned(), image: parse_image_name(name).ok()? })
    });
    place.ok_or_else(|| "write it as in lyon:golden.raw or lyon:pool/golden.raw".to_owned())
}

fn parse_image_name(text: &str) -> Result<ImageName, String> {
    let (pool, file) = text.split_once('/').unwrap_or((DEFAULT_POOL, text));
    if pool.is_empty() || file.is_empty() || file.contains('/') {
        return Err("write it as in golden.raw or pool/golden.raw".to_owned());
    }
    Ok(ImageName { pool: pool.to_owned(), file: file.to_owned() })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_teaches_with_an_example() {
        fn visit(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example:"), "no example in:\n{help}");
            command.get_subcommands_mut().for_each(visit);
        }
        visit(&mut Cli::command());
    }

    #[test]
    fn amounts_are_checked_before_anything_is_attempted() {
        let parse = |args: &str| Cli::try_parse_from(args.split(' '));
        assert!(parse("longhaul migrate db1 --to lyon --downtime-limit 300ms").is_ok());
        assert!(parse("longhaul migrate db1 --to lyon --downtime-limit 300").is_err());
        assert!(parse("longhaul seed db1 --to lyon --rate 20M").is_ok());
        assert!(parse("longhaul seed db1 --to lyon --rate fast").is_err());
        assert!(parse("longhaul seed db1 --to lyon --rate 08:00-20:00=20M,else=1G").is_ok());
        assert!(parse("longhaul seed db1 --to lyon --rate 08:00-20:00=20M").is_err());
        assert!(parse("longhaul limit").is_ok());
        assert!(parse("longhaul limit db1 --rate 1M --class seed=1M --class pages=2M").is_ok());
        assert!(parse("longhaul limit --class seed=1M").is_err());
        assert!(parse("longhaul limit db1 --class seed").is_err());
        assert!(parse("longhaul limit --rate fast").is_err());
        assert!(parse("longhaul seed db1").is_err());
        assert!(parse("longhaul seed db1 --forget").is_ok());
        assert!(parse("longhaul seed db1 --forget --to lyon").is_err());
        assert!(parse("longhaul push a.raw lyon:pool/a.raw --replace").is_ok());
        assert!(parse("longhaul push a.raw lyon").is_err());
        assert!(parse("longhaul push a.raw lyon:").is_err());
        assert!(parse("longhaul push a.raw lyon:a/b/c").is_err());
        assert!(parse("longhaul pair lyon").is_err());
        assert!(parse("longhaul pair --list --remove lyon").is_err());
        assert!(parse("longhaul migrate db1 --to lyon --detach --attached").is_err());
    }
}
