//! The `longhaul` binary: parse, run, exit code.
//!
//! Invariant: every error is printed once, here or in `cli`, and decides the exit code.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use longhaul::agent::{self, setup};
use longhaul::allocator;
use longhaul::cli::args::{AgentArgs, Cli, Command, Global, InitArgs, LogFormat};
use longhaul::cli::{self, Exit};
use longhaul::config::{Config, DEFAULT_FILE, Overrides};
use longhaul::control::{Failure, chain};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    allocator::give_large_buffers_back();
    let Cli { global, command } = Cli::parse();
    let exit = match command {
        Command::Init(args) => init(&global, &args),
        Command::Agent(args) => run_agent(&global, args),
        command => in_runtime(&mut tokio::runtime::Builder::new_current_thread(), &global, async {
            cli::run(&global, command).await
        }),
    };
    exit.into()
}

fn in_runtime(
    builder: &mut tokio::runtime::Builder,
    global: &Global,
    work: impl Future<Output = Exit>,
) -> Exit {
    match builder.enable_all().build() {
        Ok(runtime) => {
            let exit = runtime.block_on(work);
            // Whatever still blocks a thread (a name that is being looked up) is not waited for.
            runtime.shutdown_background();
            exit
        }
        Err(error) => {
            let what = format!("cannot start: {error}");
            let failure = Failure::failed(what, "", "is this host out of threads or files?");
            cli::print_failure(global.json, &failure);
            Exit::Failed
        }
    }
}

fn init(global: &Global, args: &InitArgs) -> Exit {
    let InitArgs { dir, name, listen } = args;
    match setup::init(dir.as_deref(), global.config.as_deref(), name.as_deref(), *listen) {
        Ok(prepared) if global.json => {
            let document = serde_json::json!({
                "config": prepared.file,
                "name": prepared.config.name,
                "fingerprint": prepared.fingerprint,
                "socket": prepared.config.control_socket(),
            });
            println!("{document}");
            Exit::Done
        }
        Ok(prepared) => {
            print!("{}", setup::next_steps(&prepared));
            Exit::Done
        }
        Err(error) => {
            let next = match &error {
                setup::SetupError::Exists(_) => "edit it, or choose another place with --dir",
                setup::SetupError::Io { .. } => {
                    "run as root, or set up below a folder of your own with --dir"
                }
                setup::SetupError::Config(_) | setup::SetupError::Identity(_) => "",
            };
            cli::print_failure(global.json, &Failure::refused(chain(&error), next));
            Exit::Refused
        }
    }
}

fn run_agent(global: &Global, args: AgentArgs) -> Exit {
    let AgentArgs { name, listen, state_dir, run_dir, log } = args;
    log_to_stderr(log);
    let file = global.config.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
    let overrides = Overrides { name, listen, state_dir, run_dir };
    let config = match Config::load(&file, &overrides) {
        Ok(config) => config,
        Err(error) => return refuse_to_run(global, &error, &file),
    };
    in_runtime(&mut tokio::runtime::Builder::new_multi_thread(), global, async {
        match agent::run(config, agent::mover::new).await {
            Ok(()) => Exit::Done,
            Err(error) => refuse_to_run(global, &error, &file),
        }
    })
}

fn refuse_to_run(global: &Global, error: &dyn std::error::Error, file: &Path) -> Exit {
    let next = format!("nothing runs; {} says what the agent should do", file.display());
    cli::print_failure(global.json, &Failure::refused(chain(error), next));
    Exit::Refused
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_env("LONGHAUL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}
