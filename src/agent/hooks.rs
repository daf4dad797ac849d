//! The operator's programs around the switchover.
//!
//! Invariant: a hook gets its document and its time, and no more: what runs longer is ended with all
//! that it started. It reads one JSON document on its standard input; `LONGHAUL_VM`, `LONGHAUL_PEER`,
//! `LONGHAUL_ROLE` and `LONGHAUL_HOOK` say the same to shell scripts.

use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::config::HookConfig;
use crate::migration::Completed;

/// Output of a hook that is kept for the log and the error message.
const OUTPUT_BYTES_MAX: u64 = 4096;

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// Memory has converged; the guest is about to be paused.
    BeforeSwitchover,
    /// The hand-over is done.
    AfterSwitchover,
    /// The operator takes a guest back that the peer may be running: it must not run there.
    Fence,
}

/// Which end of the migration this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The VM leaves this host.
    Source,
    /// The VM arrives here.
    Target,
}

/// What a hook is told.
#[derive(Debug, Clone, Serialize)]
pub struct Occasion {
    /// When.
    pub moment: Moment,
    /// The VM.
    pub vm: String,
    /// The other end's name here.
    pub peer: String,
    /// This end.
    pub role: Role,
    /// The report, where it is known: after the switchover, at the source.
    pub report: Option<Completed>,
}

/// Why a hook did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("cannot run the hook {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("the hook {} refused ({status}): {output}", program.display())]
    Refused {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        output: String,
    },
    /// It took too long and was ended.
    #[error("the hook {} did not end within {} s and was ended", program.display(), limit.as_secs())]
    TooSlow {
        /// The program.
        program: PathBuf,
        /// The time it had.
        limit: Duration,
    },
}

/// Runs hooks as the configuration says.
#[derive(Debug, Clone)]
pub struct Hooks {
    config: HookConfig,
}

impl Hooks {
    /// The hooks of this configuration.
    pub fn new(config: HookConfig) -> Self {
        Self { config }
    }

    /// Runs the hook for this occasion, if there is one. Before the switchover an error means: do not
    /// switch over.
    ///
    /// # Errors
    /// It could not be started, ended with another code than 0, or took too long.
    pub async fn run(&self, occasion: &Occasion) -> Result<(), HookError> {
        let program = match occasion.moment {
            Moment::BeforeSwitchover => self.config.before_switchover.clone(),
            Moment::AfterSwitchover => self.config.after_switchover.clone(),
            Moment::Fence => self.config.fence.clone(),
        };
        let Some(program) = program else { return Ok(()) };
        let source = |source| HookError::Start { program: program.clone(), source };
        let document = serde_json::to_vec(occasion).map_err(|error| source(error.into()))?;
        let word = |value: serde_json::Result<String>| {
            value.map(|text| text.trim_matches('"').to_owned()).unwrap_or_default()
        };
        let mut child = Command::new(&program)
            .env("LONGHAUL_VM", &occasion.vm)
            .env("LONGHAUL_PEER", &occasion.peer)
            .env("LONGHAUL_ROLE", word(serde_json::to_string(&occasion.role)))
            .env("LONGHAUL_HOOK", word(serde_json::to_string(&occasion.moment)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that what it started can be ended with it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(source)?;
        let limit = self.config.timeout;
        match tokio::time::timeout(limit, converse(&mut child, &document)).await {
            Ok(Ok((status, output))) if status.success() => {
                tracing::info!(hook = %program.display(), vm = %occasion.vm, output, "hook ended");
                Ok(())
            }
            Ok(Ok((status, output))) => Err(HookError::Refused { program, status, output }),
            Ok(Err(error)) => Err(source(error)),
            Err(_) => {
                end_group(&mut child).await;
                Err(HookError::TooSlow { program, limit })
            }
        }
    }
}

/// Gives the document, takes the output, waits for the end.
async fn converse(child: &mut Child, document: &[u8]) -> io::Result<(ExitStatus, String)> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let give = async {
        if let Some(mut stdin) = stdin {
            // A hook need not read what it is told.
            let _ = stdin.write_all(document).await;
        }
    };
    let take = async |pipe| match pipe {
        Some(pipe) => tail(pipe).await,
        None => String::new(),
    };
    let take_both = async { tokio::join!(take(stdout.map(boxed)), take(stderr.map(boxed))) };
    let ((), (out, err)) = tokio::join!(give, take_both);
    let status = child.wait().await?;
    let output = [out.trim(), err.trim()].join(" ");
    Ok((status, output.trim().to_owned()))
}

fn boxed(pipe: impl AsyncRead + Unpin + Send + 'static) -> Box<dyn AsyncRead + Unpin + Send> {
    Box::new(pipe)
}

/// Reads to the end and keeps the beginning.
async fn tail(mut pipe: Box<dyn AsyncRead + Unpin + Send>) -> String {
    let mut kept = Vec::new();
    let _ = (&mut pipe).take(OUTPUT_BYTES_MAX).read_to_end(&mut kept).await;
    let _ = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&kept).into_owned()
}

async fn end_group(child: &mut Child) {
    let group = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
    if let Some(group) = group {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.kill().await;
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hooks(dir: &Path, script: &str, timeout: Duration) -> Hooks {
        let path = dir.join("hook");
        // Written by a process of its own: while this one has it open, another test's child could inherit
        // that, and a file that is open for writing cannot be run.
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$0\" && chmod 755 \"$0\"";
        let mut shell = std::process::Command::new("sh");
        let written = shell.args(["-c", write]).arg(&path).arg(script).status();
        assert!(written.unwrap().success());
        Hooks::new(HookConfig {
            before_switchover: Some(path),
            after_switchover: None,
            fence: None,
            timeout,
        })
    }

    fn occasion(moment: Moment) -> Occasion {
        let (vm, peer) = ("db1".to_owned(), "lyon".to_owned());
        Occasion { moment, vm, peer, role: Role::Source, report: None }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_hook_is_told_everything_twice() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let script = format!(
            "{{ cat; echo; echo $LONGHAUL_VM $LONGHAUL_PEER $LONGHAUL_ROLE $LONGHAUL_HOOK; }} > {}",
            seen.display()
        );
        let hooks = hooks(dir.path(), &script, LONG);
        hooks.run(&occasion(Moment::BeforeSwitchover)).await.unwrap();
        let seen = std::fs::read_to_string(seen).unwrap();
        let (document, words) = seen.split_once('\n').unwrap();
        let document: serde_json::Value = serde_json::from_str(document).unwrap();
        assert_eq!(document["moment"], "before-switchover");
        assert_eq!(words.trim(), "db1 lyon source before-switchover");
        // No hook is configured for the other moment.
        hooks.run(&occasion(Moment::AfterSwitchover)).await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(dir.path(), "echo the change freeze is on >&2; exit 3", LONG);
        let error = hooks.run(&occasion(Moment::BeforeSwitchover)).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("the change freeze"), "{error}");
    }

    #[tokio::test]
    async fn a_slow_hook_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! > {0}.tmp; mv {0}.tmp {0}; wait", pid.display());
        let hooks = hooks(dir.path(), &script, Duration::from_millis(500));
        let error = hooks.run(&occasion(Moment::BeforeSwitchover)).await.unwrap_err();
        assert!(matches!(error, HookError::TooSlow { .. }), "{error}");
        let pid = std::fs::read_to_string(pid).unwrap();
        // It was signalled; until it is gone, or a zombie that nobody has collected, is the
        // kernel's time.
        let stat = format!("/proc/{}/stat", pid.trim());
        let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z"));
        let waited = tokio::time::timeout(LONG, async {
            while !gone() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited.await.expect("the child still runs");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let config = HookConfig {
            before_switchover: Some("/nonexistent/hook".into()),
            after_switchover: None,
            fence: None,
            timeout: LONG,
        };
        let error = Hooks::new(config).run(&occasion(Moment::BeforeSwitchover)).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/hook"));
    }
}
