//! `resolve`: the operator's word where no journal can be asked.
//!
//! Invariant: nothing is decided before what is known and what it risks was shown, and the VM's name
//! was typed once more.

use super::args::{Global, ResolveArgs, Runs};
use super::{CommandError, Exit, ask, ask_and_say, print, type_in};
use crate::control::{Failure, InDoubt, Reply, Request};
use crate::migration::handover::Choice;
use crate::migration::journal::Role;

pub(super) async fn run(global: &Global, args: ResolveArgs) -> Result<Exit, CommandError> {
    let ResolveArgs { vm, runs, confirm } = args;
    let Reply::Status(status) = ask(global, &Request::Status).await? else {
        return Err(CommandError::Mismatch);
    };
    let doubts: Vec<InDoubt> = status.in_doubt.into_iter().filter(|doubt| doubt.vm == vm).collect();
    // The one that holds the VM up; an older one may still wait for its peer.
    let Some(doubt) = doubts.iter().find(|doubt| doubt.blocks).or_else(|| doubts.first()) else {
        let what = format!("no hand-over of {vm} is in doubt here");
        return Err(Failure::refused(what, "`longhaul status` shows what is").into());
    };
    let Some(runs) = runs else {
        print(global, &serde_json::json!({ "in_doubt": doubt }), |_| known_text(doubt));
        return Ok(Exit::InDoubt);
    };
    let confirm = match confirm {
        Some(confirm) => confirm,
        None => {
            eprint!("{}\n{}\n", known_text(doubt), risk(doubt, runs));
            type_in(&format!("Type the VM's name to decide that it runs {}: ", word(runs)))
                .ok_or_else(|| {
                    let what = "nobody can be asked on this terminal: nothing was decided";
                    Failure::refused(what, format!("add --confirm {vm} if you mean it"))
                })?
        }
    };
    let runs = match runs {
        Runs::Here => Choice::Here,
        Runs::There => Choice::There,
    };
    ask_and_say(global, &Request::Resolve { vm, runs, confirm }).await
}

fn word(runs: Runs) -> &'static str {
    match runs {
        Runs::Here => "here",
        Runs::There => "there",
    }
}

fn known_text(doubt: &InDoubt) -> String {
    let InDoubt { vm, peer, detail, attempt, .. } = doubt;
    let role = match doubt.role {
        Role::Source => "it was leaving this host",
        Role::Target => "it was arriving here",
    };
    let since = doubt.since.map(|at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string());
    format!(
        "{vm} (with {peer}; {role})\n  known:   {detail}\n  since:   {}\n  attempt: {attempt}\n\n\
         --runs here:  {}\n--runs there: {}\n",
        since.as_deref().unwrap_or("unknown"),
        risk(doubt, Runs::Here),
        risk(doubt, Runs::There),
    )
}

/// What a decision does and risks, in a sentence or two.
fn risk(doubt: &InDoubt, runs: Runs) -> String {
    let InDoubt { vm, peer, .. } = doubt;
    match (doubt.role, runs) {
        (Role::Source, Runs::Here) => format!(
            "{vm} goes on here from where it was paused. RISK: if {peer} runs it, it runs twice until \
             the two agents meet; then the one at {peer} is stopped, and what it did is lost. Be sure \
             that {peer} is off or cut off from users and storage."
        ),
        (Role::Source, Runs::There) => format!(
            "its paused process is ended here. RISK: if {peer} does not have it, it runs nowhere and \
             its memory is lost; its disks stay here as they were when it was paused."
        ),
        (Role::Target, Runs::Here) => format!(
            "{vm} stays this host's, and nobody waits any longer for {peer} to confirm that it knows."
        ),
        (Role::Target, Runs::There) => format!(
            "only for a VM that stands still here because {peer} took it back: its process is ended, \
             and what it did here is lost for good."
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_and_both_risks_are_shown() {
        let mut doubt = InDoubt {
            vm: "db1".into(),
            peer: "lyon".into(),
            since: "2026-01-02T03:04:05Z".parse().ok(),
            detail: "lyon has not answered".into(),
            role: Role::Source,
            attempt: "00ff".into(),
            blocks: true,
        };
        let text = known_text(&doubt);
        assert!(text.starts_with("db1 (with lyon; it was leaving this host)\n"), "{text}");
        assert!(text.contains("since:   2026-01-02 03:04:05Z"), "{text}");
        assert_eq!(text.matches("RISK").count(), 2, "{text}");
        doubt.role = Role::Target;
        assert_eq!(known_text(&doubt).matches("RISK").count(), 0);
    }
}
