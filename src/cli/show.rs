//! `status`: everything worth knowing at a glance; `metrics`: all numbers, for monitoring.
//!
//! Invariant: what an operator must act upon (a hand-over in doubt) stands first.

use super::args::Global;
use super::progress::line;
use super::table::Table;
use super::{CommandError, Exit, ask, limit, pair, print, vm};
use crate::control::{
    BestTime, JobOutcome, JobRecord, JobSummary, Reply, Request, Status, WaitView, metrics_text,
};
use crate::migration::journal::Role;
use crate::units::{ByteCount, duration_text};

pub(super) async fn status(global: &Global) -> Result<Exit, CommandError> {
    let Reply::Status(status) = ask(global, &Request::Status).await? else {
        return Err(CommandError::Mismatch);
    };
    print(global, &status, |status| status_text(status));
    Ok(if status.in_doubt.is_empty() { Exit::Done } else { Exit::InDoubt })
}

pub(super) async fn metrics(global: &Global) -> Result<Exit, CommandError> {
    let Reply::Metrics(metrics) = ask(global, &Request::Metrics).await? else {
        return Err(CommandError::Mismatch);
    };
    print(global, &metrics, |metrics| metrics_text(metrics));
    Ok(Exit::Done)
}

fn status_text(status: &Status) -> String {
    let mut text = String::new();
    for doubt in &status.in_doubt {
        let (vm, peer) = (&doubt.vm, &doubt.peer);
        let word = if doubt.blocks { "IN DOUBT" } else { "NOT CONFIRMED" };
        text += &format!("{word}: {vm} (with {peer}): {}\n", doubt.detail);
        let next = match (doubt.blocks, doubt.role) {
            (true, Role::Source) => format!(
                "The agents ask each other until they have settled it; leave the VM alone. If {peer} \
                 is gone for good: `longhaul resolve {vm}`"
            ),
            _ => format!("`longhaul resolve {vm}` tells what can be done"),
        };
        text += &format!("  {next}\n\n");
    }
    let identity = &status.identity;
    text += &format!(
        "{} (longhaul {}), listens on {}\n\n",
        identity.name, status.version, identity.listen
    );
    text += &vm::vms_text(&status.vms);
    text += "\n";
    text += &pair::peers_text(&status.peers);
    if !status.jobs.is_empty() {
        text += "\n";
        text += &jobs_text(&status.jobs);
    }
    if !status.waiting.is_empty() {
        text += "\n";
        text += &waiting_text(&status.waiting);
    }
    if !status.recent.is_empty() {
        text += "\n";
        text += &recent_text(&status.recent);
    }
    text
}

fn jobs_text(jobs: &[JobSummary]) -> String {
    let mut table = Table::new(&[">JOB", "KIND", "VM", "TO", "CAP", "PROGRESS"]);
    for job in jobs {
        let (id, kind) = (job.id.to_string(), job.kind.to_string());
        let cap = job.limits.as_ref().map_or_else(|| "-".to_owned(), |limits| limit::short(limits));
        table.row([id, kind, job.vm.clone(), job.peer.clone(), cap, line(&job.progress)]);
    }
    table.render("")
}

fn waiting_text(waiting: &[WaitView]) -> String {
    let mut table = Table::new(&["WAITS", "TO", "WINDOW", "NOW", "DISKS", "BEST TIME", "TROUBLE"]);
    for wait in waiting {
        let until = wait.until.map(|at| at.strftime(" until %Y-%m-%d %H:%M:%SZ").to_string());
        let now = if wait.is_open { "open" } else { "closed" };
        table.row([
            wait.vm.clone(),
            wait.to.clone(),
            wait.windows.clone(),
            format!("{now}{}", until.unwrap_or_default()),
            if wait.seeded { "ahead" } else { "to go" }.to_owned(),
            wait.best_time.as_ref().map_or_else(|| "-".to_owned(), best_time_text),
            wait.trouble.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.render("")
}

/// `2026-11-28 02:10Z: 3.1 GiB, now 5.0 GiB`.
fn best_time_text(best: &BestTime) -> String {
    let size = |mib: u64| ByteCount(mib << 20).to_string();
    let Some(starts) = best.starts else { return "none in time".to_owned() };
    let now = best.now_mib.map(|mib| format!(", now {}", size(mib))).unwrap_or_default();
    format!("{}: {}{now}", starts.strftime("%Y-%m-%d %H:%MZ"), size(best.cost_mib))
}

fn recent_text(records: &[JobRecord]) -> String {
    let mut table = Table::new(&[">JOB", "KIND", "VM", "TO", "ENDED", "HOW"]);
    for record in records {
        table.row([
            record.id.to_string(),
            record.kind.to_string(),
            record.vm.clone(),
            record.peer.clone(),
            record.ended.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
            how(&record.outcome),
        ]);
    }
    table.render("")
}

fn how(outcome: &JobOutcome) -> String {
    match outcome {
        JobOutcome::Failed(failure) => format!("failed: {}", failure.what),
        JobOutcome::Completed(completed) => {
            let wire = ByteCount(completed.wire_bytes);
            let total = duration_text(completed.total_ms);
            match &completed.downtime {
                Some(downtime) => {
                    format!("done in {total}, downtime {:.0} ms, wire {wire}", downtime.total_ms)
                }
                None => format!("done in {total}, wire {wire}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{InDoubt, OwnIdentity};

    #[test]
    fn doubt_comes_first_and_empty_lists_teach() {
        let identity = OwnIdentity {
            name: "paris".into(),
            fingerprint: "LH-0".into(),
            listen: "0.0.0.0:4873".into(),
            reachable: None,
        };
        let doubt = InDoubt {
            vm: "db1".into(),
            peer: "lyon".into(),
            since: None,
            detail: "lyon has not confirmed that it runs".into(),
            role: Role::Source,
            attempt: "00".into(),
            blocks: true,
        };
        let mut status = Status {
            version: "0.1.0".into(),
            identity,
            vms: vec![],
            peers: vec![],
            jobs: vec![],
            in_doubt: vec![doubt],
            recent: vec![],
            waiting: vec![],
        };
        let text = status_text(&status);
        assert!(text.starts_with("IN DOUBT: db1 (with lyon): lyon has not"), "{text}");
        status.in_doubt.clear();
        let text = status_text(&status);
        assert!(text.starts_with("paris (longhaul 0.1.0)"), "{text}");
        assert!(text.contains("`longhaul vm start FILE`") && text.contains("`longhaul pair`"));
    }
}
