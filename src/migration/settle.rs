//! Carries out the source's half of the hand-over: journal, token, the target's answer.
//!
//! Invariant: effects are carried out in the order in which the state machine gives them, and a
//! lost link changes nothing but whom to ask: the question is repeated until the target's journal
//! answers, in this life of the agent or a later one.

use std::time::Duration;

use longhaul_transport::Session;

use super::error::MigrationError;
use super::handover::{Source, SourceEffect, SourceEvent, SourceRecord, SourceState, Verdict};
use super::job::{Dial, Site};
use super::journal::{History, Journal, Record};
use super::link::Link;
use super::message::{JobId, TargetTimes, ToSource, ToTarget, Token};
use crate::hypervisor::SourceVm;

/// First wait between two questions to a peer that does not answer; it doubles up to the other.
const ASK_WAIT_FIRST: Duration = Duration::from_millis(500);
const ASK_WAIT_MAX: Duration = Duration::from_secs(15);
/// How long a target may take to answer one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// The source at the moment of the hand-over.
pub(super) struct HandingOver<'a> {
    pub(super) vm: &'a dyn SourceVm,
    pub(super) link: &'a Link,
    pub(super) dial: &'a dyn Dial,
    pub(super) id: JobId,
    pub(super) name: &'a str,
    pub(super) peer: &'a str,
    /// Whether the guest ran before the attempt.
    pub(super) ran: bool,
}

impl HandingOver<'_> {
    /// Delegates and returns once the target's decision was carried out here: with the target's
    /// times if it runs the guest, with an error if the guest is ours again.
    pub(super) async fn delegate(
        &self,
        journal: &mut Journal,
        token: Token,
        note: impl Fn(String),
    ) -> Result<TargetTimes, MigrationError> {
        let mut source = Source::new(None);
        let effects = source.on(SourceEvent::Ready);
        debug_assert_eq!(effects, [SourceEffect::Journal(SourceRecord::Delegated)]);
        if let Err(error) = journal.append(&Record::Source { step: SourceRecord::Delegated }) {
            self.carry_out(source.on(SourceEvent::JournalFailed), journal).await?;
            return Err(MigrationError::Io {
                doing: format!(
                    "journaling the hand-over of {}: it was not handed over and runs on here",
                    self.name
                ),
                source: error,
            });
        }
        source.on(SourceEvent::Journaled);
        debug_assert_eq!(source.state(), SourceState::Delegated);
        // A token that does not go out may still have gone out: the answer tells.
        let answer = match self.link.tell(&ToTarget::Token(token)).await {
            Ok(()) => self.answer_on_this_link().await,
            Err(_) => None,
        };
        let (verdict, reason, times) = match answer {
            Some(answer) => answer,
            None => {
                note(format!(
                    "the link was lost in the hand-over of {}: it is paused here until {} \
                     answers; asking again",
                    self.name, self.peer
                ));
                ask_until_decided(self.dial, self.id, self.peer).await
            }
        };
        let event = match verdict {
            Verdict::Runs => SourceEvent::PeerRuns,
            Verdict::Refused => SourceEvent::PeerRefused,
            // Both ways here ask on until it is decided; if one ever did not, nothing may resume.
            Verdict::Undecided => SourceEvent::PeerReachable,
        };
        self.carry_out(source.on(event), journal).await?;
        if let Some(reason) = &reason
            && verdict == Verdict::Runs
        {
            note(format!("{} says: {reason}", self.peer));
        }
        match verdict {
            Verdict::Runs => Ok(times),
            Verdict::Undecided => Err(MigrationError::InDoubt {
                vm: self.name.to_owned(),
                peer: self.peer.to_owned(),
                job: self.id,
            }),
            Verdict::Refused => Err(MigrationError::Peer {
                peer: self.peer.to_owned(),
                reason: reason.unwrap_or_else(|| "it refused the hand-over".into()),
            }),
        }
    }

    async fn answer_on_this_link(&self) -> Option<(Verdict, Option<String>, TargetTimes)> {
        loop {
            match self.link.reply().await.ok()? {
                ToSource::Verdict { job, verdict, reason, times }
                    if job == self.id && verdict != Verdict::Undecided =>
                {
                    return Some((verdict, reason, times));
                }
                _ => {}
            }
        }
    }

    async fn carry_out(
        &self,
        effects: Vec<SourceEffect>,
        journal: &mut Journal,
    ) -> Result<(), MigrationError> {
        carry_out(effects, journal, self.vm, self.ran).await
    }
}

/// Carries out what follows from the target's decision. A journal that fails here stops nothing:
/// the target's is the one that counts, and a restart asks it again.
async fn carry_out(
    effects: Vec<SourceEffect>,
    journal: &mut Journal,
    vm: &dyn SourceVm,
    ran: bool,
) -> Result<(), MigrationError> {
    for effect in effects {
        match effect {
            SourceEffect::Journal(step) => {
                if let Err(error) = journal.append(&Record::Source { step }) {
                    tracing::error!(%error, ?step, "could not journal the target's decision");
                }
            }
            SourceEffect::Rollback => {
                vm.rollback(ran).await?;
                vm.cleanup(false).await?;
            }
            SourceEffect::Destroy => vm.destroy().await?,
            SourceEffect::SendToken
            | SourceEffect::Ask
            | SourceEffect::SendAbort
            | SourceEffect::TooLate => {}
        }
    }
    Ok(())
}

/// Asks until the target has decided; without end, because nobody else may decide.
async fn ask_until_decided(
    dial: &dyn Dial,
    id: JobId,
    peer: &str,
) -> (Verdict, Option<String>, TargetTimes) {
    let mut wait = ASK_WAIT_FIRST;
    loop {
        match ask(dial, id).await {
            Ok((verdict, reason, times)) if verdict != Verdict::Undecided => {
                return (verdict, reason, times);
            }
            Ok(_) => tracing::info!(peer, job = %id, "the target has not decided yet"),
            Err(error) => tracing::warn!(peer, job = %id, error, "in doubt; asking again"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(ASK_WAIT_MAX);
    }
}

async fn ask(dial: &dyn Dial, id: JobId) -> Result<(Verdict, Option<String>, TargetTimes), String> {
    let session: Session = dial.dial().await?;
    let (control, mut answers) = session.control().ok_or("its control stream is in use")?;
    control.send(&ToTarget::Ask { job: id }).await.map_err(|error| error.to_string())?;
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, answers.recv::<ToSource>())
        .await
        .map_err(|_| "it does not answer".to_owned())?
        .map_err(|error| error.to_string())?;
    session.close("thank you");
    match answer {
        Some(ToSource::Verdict { job, verdict, reason, times }) if job == id => {
            Ok((verdict, reason, times))
        }
        _ => Err("it answers something else".into()),
    }
}

/// Brings an attempt of an earlier life of this agent to its end, at its source. Returns what
/// happened, for the operator.
pub async fn recover_source(
    site: &Site,
    history: &History,
    dial: &dyn Dial,
) -> Result<String, MigrationError> {
    let Some((_, name, peer, ran)) = history.began() else {
        return Ok(format!("the journal of attempt {} says nothing; left alone", history.job));
    };
    let io = |source| MigrationError::Io { doing: "continuing the journal".into(), source };
    let mut journal = site.journals.reopen(history.job).map_err(io)?;
    let mut source = Source::new(history.source_step());
    let said = match source.state() {
        SourceState::Ours | SourceState::Delegating if !site.host.runs(name).await => {
            format!("{name} is this host's and does not run: its move to {peer} was interrupted")
        }
        SourceState::Ours | SourceState::Delegating => {
            let vm = site.host.source(name).await?;
            vm.rollback(ran).await?;
            vm.cleanup(false).await?;
            format!("{name} stays here: its move to {peer} was interrupted before the hand-over")
        }
        SourceState::Gone => {
            destroy(site, name).await?;
            format!("{name} runs at {peer}")
        }
        SourceState::Delegated => {
            let (verdict, reason, _) = ask_until_decided(dial, history.job, peer).await;
            if verdict == Verdict::Runs {
                source.on(SourceEvent::PeerRuns);
                let gone = Record::Source { step: SourceRecord::Gone };
                journal.append(&gone).map_err(io)?;
                destroy(site, name).await?;
                format!("{name} runs at {peer}")
            } else if !site.host.runs(name).await {
                let kept = Record::Source { step: SourceRecord::Kept };
                journal.append(&kept).map_err(io)?;
                format!("{name} is this host's and does not run: {peer} refused the hand-over")
            } else {
                let vm = site.host.source(name).await?;
                carry_out(source.on(SourceEvent::PeerRefused), &mut journal, &*vm, ran).await?;
                let reason = reason.unwrap_or_default();
                format!("{name} runs on here: {peer} refused the hand-over ({reason})")
            }
        }
    };
    journal.append(&Record::Ended).map_err(io)?;
    Ok(said)
}

/// Ends the parked process, if it still lives, and forgets the VM.
async fn destroy(site: &Site, name: &str) -> Result<(), MigrationError> {
    if site.host.runs(name).await {
        site.host.source(name).await?.destroy().await?;
    }
    site.host.departed(name).await?;
    Ok(())
}
