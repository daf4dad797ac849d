//! What a user can type, and which part of the lab does it.
//!
//! Invariant: nothing is decided here; every command is a few calls into the library.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use longhaul_bench::chunks;
use longhaul_bench::netns::{self, Side};
use longhaul_bench::profile::{Overrides, Profile};
use longhaul_bench::run::{self, Plan};
use longhaul_bench::simulate;
use longhaul_bench::transfer::{self, ends, summary};
use longhaul_bench::wan::{self, Request, Spec, lab_binary};
use longhaul_bench::{push, row, speed};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Emulated WAN, guests, rivals and measurements.
#[derive(Debug, Parser)]
#[command(name = "lab")]
struct Cli {
    #[command(subcommand)]
    command: Area,
}

#[derive(Debug, Subcommand)]
enum Area {
    /// A WAN between two network namespaces of this host.
    #[command(subcommand)]
    Wan(WanCommand),
    /// Moves a guest under load through a WAN and writes down what it took.
    Run {
        #[command(flatten)]
        over: Over,
        #[command(flatten)]
        plan: Box<Plan>,
    },
    /// Sends images to a peer through a WAN, without a guest, and writes down what it took.
    Push {
        #[command(flatten)]
        over: Over,
        #[command(flatten)]
        plan: push::Plan,
    },
    /// What the transport and its rivals make of a WAN, without a guest.
    #[command(subcommand)]
    Link(LinkCommand),
    /// Ways to find one disk image in another, and rivals on the same images.
    #[command(subcommand)]
    Chunks(ChunksCommand),
    /// Days of recorded load on simulated hosts, without a guest or a WAN.
    #[command(subcommand)]
    Simulate(SimulateCommand),
    /// Prints medians and ratios of result rows.
    Compare(Comparison),
}

#[derive(Debug, Subcommand)]
enum SimulateCommand {
    /// Holds the simulator to CloudSim 3.0.3: the same days under the same two rules.
    Honest(simulate::HonestPlan),
    /// Cool hosts with few moves: the planner beside other balancers on full hosts.
    Balance(simulate::balance::BalancePlan),
    /// Few hosts for the load: the planner beside THR-MMT and LR-MMT on the same days.
    Consolidate(simulate::consolidate::ConsolidatePlan),
    /// Out before a deadline: the planner beside simple orders and a proven bound.
    Evacuate(simulate::evacuate::EvacuatePlan),
    /// The load of links up to a day ahead: the forecaster beside simple rules.
    Forecasts(simulate::forecasts::ForecastPlan),
    /// When to send one VM: the planner beside "now", a fixed hour, and who knows all.
    Windows(simulate::windows::WindowsPlan),
    /// Time one balance decision over many hosts and VMs.
    Light(simulate::light::LightPlan),
}

#[derive(Debug, Subcommand)]
enum ChunksCommand {
    /// Measures schemes on a pair of images.
    Run(chunks::Plan),
    /// Measures other tools on a pair of images.
    Rivals(chunks::RivalPlan),
    /// Measures how fast one core cuts, hashes and looks up, beside FastCDC alone and BLAKE3 alone.
    Speed(chunks::speed::SpeedPlan),
    /// Measures look-ups in indexes of several sizes.
    Sizes(chunks::sizes::SizesPlan),
    /// Prints rows as a table: MiB, and seconds of one core for each GiB.
    Compare(Comparison),
}

#[derive(Debug, Subcommand)]
enum LinkCommand {
    /// Measures one tool after another, each alone on a WAN of its own, run after run.
    Run {
        #[command(flatten)]
        over: Over,
        #[command(flatten)]
        plan: transfer::link::Plan,
    },
    /// Lets several flows share one WAN.
    Share {
        #[command(flatten)]
        over: Over,
        #[command(flatten)]
        plan: transfer::share::Plan,
    },
    /// Prints medians of rows, and longhaul's goodput over each rival's.
    Compare(Comparison),
    /// One end of a flow: takes an order from standard input.
    #[command(hide = true)]
    End,
}

#[derive(Debug, Subcommand)]
enum WanCommand {
    /// Brings a WAN up; it stays until `down`.
    Up(UpArguments),
    /// Takes a WAN down, with every process in its namespaces.
    Down(Name),
    /// Loses every packet from now on, those under way included.
    Cut(Name),
    /// Ends a cut.
    Restore(Name),
    /// Prints what passed so far, as JSON.
    Stats(Name),
    /// Runs a command at one end.
    Exec {
        #[command(flatten)]
        name: Name,
        /// Which end.
        side: Side,
        /// The command with its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Measures round trip, TCP and UDP rate through a WAN that is up; prints JSON.
    Check {
        #[command(flatten)]
        name: Name,
        /// Seconds of each rate measurement.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// Rate of the UDP measurement in Mbit/s; the WAN's own if absent.
        #[arg(long)]
        udp_mbit: Option<u64>,
    },
    /// Owns a WAN whose folder was prepared; ends when standard input does.
    #[command(hide = true)]
    Own(Name),
}

#[derive(Debug, Args)]
struct Name {
    /// The WAN's name.
    #[arg(long, default_value = "lab")]
    name: String,
}

/// Over what link.
#[derive(Debug, Args)]
struct Over {
    /// metro, continental, intercontinental, satellite, bursty, bufferbloat, shallow, changing,
    /// direct, or a TOML file.
    #[arg(long)]
    profile: String,
    #[command(flatten)]
    overrides: Overrides,
}

impl Over {
    fn profile(&self) -> Result<Profile> {
        self.overrides.apply(Profile::find(&self.profile)?)
    }
}

#[derive(Debug, Args)]
struct Comparison {
    /// Result files.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
}

impl Comparison {
    fn print<T: DeserializeOwned, S: Serialize>(
        &self,
        summarise: impl FnOnce(&[T]) -> S,
        table: impl FnOnce(&S) -> String,
    ) -> Result<()> {
        let mut rows = Vec::new();
        for file in &self.files {
            rows.extend(row::read(file)?);
        }
        let summary = summarise(&rows);
        if self.json {
            println!("{}", serde_json::to_string_pretty(&summary)?);
        } else {
            print!("{}", table(&summary));
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
struct UpArguments {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    over: Over,
    /// Decides losses and jitter.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where stats go each second and at the end, as JSON.
    #[arg(long)]
    stats: Option<PathBuf>,
    /// Stay here until Ctrl-C instead of going to the background.
    #[arg(long)]
    foreground: bool,
}

/// Parses the command line and does what it says.
///
/// # Errors
///
/// What failed, with what to do about it.
pub(crate) fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Area::Wan(command) => return wan_command(command),
        Area::Run { over, plan } => run::run(&plan, &over.profile()?)?,
        Area::Push { over, plan } => push::run(&plan, &over.profile()?)?,
        Area::Link(command) => link_command(command)?,
        Area::Chunks(command) => chunks_command(command)?,
        Area::Simulate(SimulateCommand::Honest(plan)) => simulate::honest(&plan)?,
        Area::Simulate(SimulateCommand::Balance(plan)) => simulate::balance::balance(&plan)?,
        Area::Simulate(SimulateCommand::Consolidate(plan)) => {
            simulate::consolidate::consolidate(&plan)?;
        }
        Area::Simulate(SimulateCommand::Windows(plan)) => simulate::windows::windows(&plan)?,
        Area::Simulate(SimulateCommand::Forecasts(plan)) => simulate::forecasts::forecasts(&plan)?,
        Area::Simulate(SimulateCommand::Light(plan)) => simulate::light::light(&plan)?,
        Area::Simulate(SimulateCommand::Evacuate(plan)) => simulate::evacuate::evacuate(&plan)?,
        Area::Compare(comparison) => {
            comparison.print(row::summarise, |summaries| row::table(summaries))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn link_command(command: LinkCommand) -> Result<()> {
    match command {
        LinkCommand::Run { over, plan } => transfer::link::run(&plan, &over.profile()?),
        LinkCommand::Share { over, plan } => transfer::share::run(&plan, &over.profile()?),
        LinkCommand::Compare(comparison) => comparison.print(summary::summarise, summary::table),
        LinkCommand::End => ends::run(),
    }
}

fn chunks_command(command: ChunksCommand) -> Result<()> {
    match command {
        ChunksCommand::Run(plan) => chunks::run(&plan),
        ChunksCommand::Rivals(plan) => chunks::run_rivals(&plan),
        ChunksCommand::Speed(plan) => chunks::speed::run(&plan),
        ChunksCommand::Sizes(plan) => chunks::sizes::run(&plan),
        ChunksCommand::Compare(comparison) => {
            comparison.print(<[chunks::Row]>::to_vec, |rows| chunks::report::table(rows))
        }
    }
}

fn wan_command(command: WanCommand) -> Result<ExitCode> {
    match command {
        WanCommand::Up(arguments) => wan_up(arguments)?,
        WanCommand::Down(name) => wan::down(&name.name)?,
        WanCommand::Cut(name) => print_stats(&name, Request::Cut)?,
        WanCommand::Restore(name) => print_stats(&name, Request::Restore)?,
        WanCommand::Stats(name) => print_stats(&name, Request::Stats)?,
        WanCommand::Exec { name, side, command } => {
            netns::check_name(&name.name)?;
            netns::enter(&name.name, side)?;
            let [program, arguments @ ..] = command.as_slice() else {
                anyhow::bail!("there is no command to run");
            };
            let error = Command::new(program).args(arguments).exec();
            return Err(error).with_context(|| format!("while starting {program}"));
        }
        WanCommand::Check { name, seconds, udp_mbit } => {
            wan_check(&name.name, Duration::from_secs(seconds), udp_mbit)?;
        }
        WanCommand::Own(name) => wan::own(&name.name)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn wan_up(arguments: UpArguments) -> Result<()> {
    let profile = arguments.over.profile()?;
    let stats_file = arguments.stats.map(std::path::absolute).transpose()?;
    let spec = Spec { name: arguments.name.name, profile, seed: arguments.seed, stats_file };
    if arguments.foreground {
        return wan::own_in_foreground(&spec);
    }
    let pid = wan::up_in_background(&lab_binary()?, &spec)?;
    eprintln!(
        "WAN {}: {} ({}) and {} ({}), relay {pid}",
        spec.name,
        netns::namespace(&spec.name, Side::A),
        Side::A.address(),
        netns::namespace(&spec.name, Side::B),
        Side::B.address(),
    );
    Ok(())
}

fn print_stats(name: &Name, request: Request) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(&wan::ask(&name.name, request)?)?);
    Ok(())
}

fn wan_check(name: &str, time: Duration, udp_mbit: Option<u64>) -> Result<()> {
    let spec = wan::spec(name)?;
    let rtt = speed::rtt(name, 20)?;
    let start = wan::ask(name, Request::Stats)?;
    let tcp = speed::tcp(name, Side::A, 10 * spec.profile.rtt(), time)?;
    let after_tcp = wan::ask(name, Request::Stats)?;
    let udp_rate = udp_mbit.map_or(spec.profile.rate_bits_per_s, |mbit| mbit * 1_000_000);
    let udp = speed::udp(name, Side::A, udp_rate, time)?;
    let after_udp = wan::ask(name, Request::Stats)?;
    let cpu = |from: &longhaul_bench::relay::Stats, to: &longhaul_bench::relay::Stats| {
        (to.cpu_s - from.cpu_s) / (to.elapsed_s - from.elapsed_s)
    };
    let report = serde_json::json!({
        "profile": spec.profile.name,
        "tcp_congestion_control": netns::congestion_control(name, Side::A)?,
        "rtt": rtt,
        "tcp": tcp,
        "tcp_relay_cpus": cpu(&start, &after_tcp),
        "udp": udp,
        "udp_relay_cpus": cpu(&after_tcp, &after_udp),
        "stats": after_udp,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
