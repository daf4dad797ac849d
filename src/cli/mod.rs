//! The commands: each asks the local agent and shows what it answers.
//!
//! Invariant: commands decide nothing and touch nothing by themselves; the control protocol is all
//! they know of the agent. Results go to stdout, progress and errors to stderr; with `--json`
//! everything goes to stdout, one document per line. An error is printed once, in three parts: what
//! happened, what state the VM is in, what to do.

pub mod args;
mod index;
mod limit;
mod moves;
mod pair;
mod plan;
mod progress;
mod report;
mod resolve;
mod show;
mod store;
mod table;
mod verify;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use args::{Command, Global};

use crate::config::{self, Config, ConfigError, Overrides};
use crate::control::{
    self, Answer, CallError, Failure, FailureKind, Reply, Request, Response, chain,
};

/// How a command ended; the numbers are part of the command line's promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed, safely.
    Failed = 1,
    /// Wrong to begin with.
    Refused = 2,
    /// Which side may run a VM has to be found out.
    InDoubt = 3,
    /// No agent answers.
    NoAgent = 4,
    /// Somebody cancelled it.
    Cancelled = 5,
    /// Ctrl-C: the job goes on.
    StoppedWatching = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    /// The agent could not be asked.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The configuration, which names the socket, could not be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The agent, or the command itself, says no.
    #[error("{}", .0.what)]
    Failure(Failure),
    /// The agent answered something else than was asked.
    #[error("the agent answered something else than was asked")]
    Mismatch,
}

impl From<Failure> for CommandError {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl CommandError {
    fn exit(&self) -> Exit {
        match self {
            Self::Call(_) | Self::Mismatch => Exit::NoAgent,
            Self::Config(_) => Exit::Refused,
            Self::Failure(failure) => match failure.kind {
                FailureKind::Failed => Exit::Failed,
                FailureKind::Refused => Exit::Refused,
                FailureKind::InDoubt => Exit::InDoubt,
                FailureKind::Cancelled => Exit::Cancelled,
            },
        }
    }

    /// The same in the three parts that every error has.
    fn into_failure(self) -> Failure {
        let what = chain(&self);
        match self {
            Self::Failure(failure) => failure,
            Self::Call(error) => Failure::failed(what, "", error.next()),
            Self::Config(_) => Failure::refused(what, ""),
            Self::Mismatch => Failure::failed(what, "", "restart the agent after an update"),
        }
    }
}

/// Runs one command and shows what comes of it.
pub async fn run(global: &Global, command: Command) -> Exit {
    let result = match command {
        Command::Pair(args) => pair::run(global, args).await,
        Command::Vm(command) => vm::run(global, command).await,
        Command::Seed(args) => moves::seed(global, args).await,
        Command::Migrate(args) => moves::migrate(global, args).await,
        Command::Push(args) => moves::push(global, args).await,
        Command::Pull(args) => moves::pull(global, args).await,
        Command::Watch(args) => moves::watch(global, args.vm).await,
        Command::Cancel(args) => moves::cancel(global, args.vm).await,
        Command::Resolve(args) => resolve::run(global, args).await,
        Command::Status => show::status(global).await,
        Command::Metrics => show::metrics(global).await,
        Command::Limit(args) => limit::run(global, args).await,
        Command::Index(args) => index::run(global, args).await,
        Command::Store(command) => store::run(global, command).await,
        Command::Verify(args) => verify::run(global, args).await,
        Command::Plan(args) => plan::plan(global, args).await,
        Command::Drain(args) => plan::drain(global, args).await,
        Command::Evacuate(args) => plan::evacuate(global, args).await,
        // These two are the agent itself; `main` starts it.
        Command::Init(_) | Command::Agent(_) => Err(CommandError::Mismatch),
    };
    result.unwrap_or_else(|error| {
        let exit = error.exit();
        print_failure(global.json, &error.into_failure());
        exit
    })
}

/// Prints a failure the one way that failures are printed.
pub fn print_failure(json: bool, failure: &Failure) {
    if json {
        print_json(&serde_json::json!({ "failed": failure }));
    } else {
        eprint!("{}", failure_text(failure));
    }
}

fn failure_text(failure: &Failure) -> String {
    let mut text = format!("longhaul: {}\n", failure.what);
    for (label, part) in [("state", &failure.state), ("next", &failure.next)] {
        if !part.is_empty() {
            text += &format!("  {:<7}{part}\n", format!("{label}:"));
        }
    }
    text
}

fn print_json(value: &impl serde::Serialize) {
    match serde_json::to_string(value) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("longhaul: cannot print the answer: {error}"),
    }
}

/// Prints a reply: as JSON, or with `text`.
fn print<T: serde::Serialize>(global: &Global, value: &T, text: impl FnOnce(&T) -> String) {
    if global.json {
        print_json(value);
    } else {
        print!("{}", text(value));
    }
}

/// The agent's socket: as typed, as the configuration says, or where it is by default.
fn socket(global: &Global) -> Result<PathBuf, ConfigError> {
    if let Some(socket) = &global.socket {
        return Ok(socket.clone());
    }
    match (&global.config, PathBuf::from(config::DEFAULT_FILE)) {
        (Some(file), _) => Config::load(file, &Overrides::default()).map(|c| c.control_socket()),
        // A user who cannot read the configuration gets a better answer from the socket.
        (None, file) => Ok(Config::load(&file, &Overrides::default()).map_or_else(
            |_| config::control_socket(config::DEFAULT_RUN_DIR.as_ref()),
            |c| c.control_socket(),
        )),
    }
}

/// Has the agent do work that is no job, and shows how far it is until it answers.
async fn work(global: &Global, request: &Request) -> Result<Response, CommandError> {
    let mut call = control::call(&socket(global)?, request).await?;
    let mut display = progress::Display::new(global.json);
    let response = loop {
        match call.next().await? {
            Answer::Event(event) => display.show(&event),
            Answer::Response(response) => break response,
        }
    };
    display.finish();
    Ok(response)
}

/// Asks for something that is answered at once.
async fn ask(global: &Global, request: &Request) -> Result<Reply, CommandError> {
    let mut call = control::call(&socket(global)?, request).await?;
    loop {
        match call.next().await? {
            Answer::Event(_) => {}
            Answer::Response(Response::Done(reply)) => return Ok(reply),
            Answer::Response(Response::Failed(failure)) => return Err(failure.into()),
        }
    }
}

/// Asks for something that is answered with a sentence, and prints it.
async fn ask_and_say(global: &Global, request: &Request) -> Result<Exit, CommandError> {
    let Reply::Said(said) = ask(global, request).await? else { return Err(CommandError::Mismatch) };
    print(global, &serde_json::json!({ "said": said }), |_| format!("{said}\n"));
    Ok(Exit::Done)
}

/// Asks a yes-or-no question on the terminal; `None` without one.
fn confirm(question: &str) -> Option<bool> {
    let answer = type_in(&format!("{question} [y/N] "))?;
    Some(matches!(answer.as_str(), "y" | "Y" | "yes"))
}

/// Asks for a line on the terminal; `None` without one.
fn type_in(question: &str) -> Option<String> {
    use std::io::{BufRead, IsTerminal, Write};
    if !std::io::stdin().is_terminal() {
        return None;
    }
    eprint!("{question}");
    std::io::stderr().flush().ok()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).ok()?;
    Some(answer.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_up_to_three_parts() {
        let failure = Failure::failed("the link was down for 10 min", "db1 runs here", "try again");
        assert_eq!(
            failure_text(&failure),
            "longhaul: the link was down for 10 min\n  state: db1 runs here\n  next:  try again\n"
        );
        assert_eq!(failure_text(&Failure::refused("no", "")), "longhaul: no\n");
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = CommandError::Call(CallError::NoAgent {
            socket: "/x".into(),
            source: std::io::Error::other("nobody there"),
        });
        assert_eq!(chain(&error), "no agent answers at /x: nobody there");
        assert_eq!(error.exit(), Exit::NoAgent);
        assert!(error.into_failure().next.contains("longhaul agent"));
    }
}
