//! The operator's word at a source that is in doubt.
//!
//! Invariant: it is followed only after the target was asked once more and did not answer, and never
//! against what the hypervisor shows.

use super::Leaving;
use crate::hypervisor::RunState;
use crate::migration::doubts::Word;
use crate::migration::error::{MigrationError, chain};
use crate::migration::handover::{Choice, SourceEvent, SourceState};

impl Leaving<'_> {
    /// Does as the operator says, unless the target answers after all.
    pub(super) async fn follow(&mut self, word: Word) -> Result<(), MigrationError> {
        let Word { choice, answer } = word;
        let asked = match self.ask_again().await {
            Some(event) => self.feed(event).await,
            None => Ok(()),
        };
        match self.machine.state() {
            SourceState::Delegated => {}
            SourceState::Withdrawing => {
                let _ = answer.send(Err(self.said()));
                return asked;
            }
            _ => {
                let said = format!("{} has answered, nothing was overruled: ", self.peer);
                let _ = answer.send(Ok(said + &self.said()));
                return asked;
            }
        }
        if let Err(why) = self.can_follow(choice).await {
            let _ = answer.send(Err(why));
            return Ok(());
        }
        self.state.not_resolved = false;
        let followed = self.feed(SourceEvent::Resolve(choice)).await;
        let said = match &followed {
            _ if self.state.not_resolved => Err(format!(
                "the word could not be written down, so it was not followed: {} stays as it is",
                self.name
            )),
            _ if self.machine.state() == SourceState::Withdrawing => Err(self.said()),
            Ok(()) => Ok(self.said()),
            Err(error) => Err(format!("{}; but: {}", self.said(), chain(&error))),
        };
        let _ = answer.send(said);
        followed
    }

    /// Whether nothing here speaks against the operator's word, and the other side is fenced off if
    /// it needs to be.
    async fn can_follow(&self, choice: Choice) -> Result<(), String> {
        let (name, peer) = (self.name, self.peer);
        match choice {
            Choice::There if self.is_running().await => Err(format!(
                "{name} runs here: it was given back (or resumed by hand), and is not ended"
            )),
            Choice::There => Ok(()),
            Choice::Here if !self.site.host.knows(name) => {
                Err(format!("{name} was let go here: {peer} has said that it runs"))
            }
            Choice::Here => {
                let fenced = self.site.hooks.fence(name, peer).await;
                fenced.map_err(|why| format!("the fence hook failed, {name} stays as it is: {why}"))
            }
        }
    }

    /// Whether the guest is seen to run here, whatever the journal says.
    pub(super) async fn is_running(&self) -> bool {
        if !self.site.host.runs(self.name).await {
            return false;
        }
        match self.vm().await {
            Ok(vm) => matches!(vm.run_state().await, Ok(RunState::Running)),
            Err(_) => false,
        }
    }
}
