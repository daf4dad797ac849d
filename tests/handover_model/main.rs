//! The hand-over's two machines under a model checker: every order of messages, crashes, failed
//! writes, dying hypervisors and operator's words, up to bounds.
//!
//! Invariant: what is explored is the product's code (`migration::handover`), stepped by a shell that
//! follows the rules of `migration::settle`; the bounds are those of `WHOLE` below, and the space
//! within them is explored whole, or the test fails.
//!
//! Two agents, one attempt. The network keeps, drops, duplicates and reorders messages without end.
//! Everything else that can go wrong has a budget for each side. A crash may come between any two
//! effects, loses all that is not durable, and may take the hypervisor with it (a host that crashes).
//! An attempt that could not be ended is settled from its journal, as the agent does it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(unreachable_pub, reason = "the files of a test are one program")]
#![allow(missing_docs, reason = "names of states and steps that say what they are")]

mod bugs;
mod graph;
mod shell;
mod world;

use std::time::Instant;

use longhaul::migration::handover::{
    Choice, SourceEffect, SourceEvent, SourceState, TargetEffect, TargetEvent, TargetRecord,
    TargetState,
};
use stateright::{Checker, HasDiscoveries, Model, Property};

use bugs::Bug;
use world::{Budget, Message, Qemu, Turn, World};

/// One attempt within these bounds, with or without a bug.
#[derive(Debug, Clone, Copy)]
pub struct HandOver {
    left: Budget,
    bug: Option<Bug>,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// The guest is paused and everything sent: the source's hypervisor is parked.
    Park,
    /// The source's machine learns of it.
    Parked,
    /// Somebody or something ends the attempt at the source, before the hand-over.
    SourceAborts,
    SourceActs(Turn),
    TargetActs(Turn),
    Verified,
    /// What arrived is wrong, or cannot be used.
    TargetFails,
    /// The target notices that its hypervisor is gone, or that data cannot come any more.
    TargetMissesIt,
    /// The target notices that the link or the source is gone.
    TargetAborts,
    Deliver(Message),
    Drop(Message),
    SourceRetries,
    TargetRetries,
    SourceSettles,
    TargetSettles,
    SourceCrashes {
        host: bool,
    },
    TargetCrashes {
        host: bool,
    },
    SourceRestarts,
    TargetRestarts,
    SourceQemuDies,
    TargetQemuDies,
    SourceWord(Choice),
    TargetWord(Choice),
}

impl Step {
    /// Whether it is no fault and nobody's decision: what the agents do by themselves while the link
    /// works.
    fn is_by_itself(self) -> bool {
        match self {
            Self::SourceActs(turn) | Self::TargetActs(turn) => turn == Turn::Well,
            Self::Park
            | Self::Parked
            | Self::Verified
            | Self::TargetAborts
            | Self::TargetMissesIt
            | Self::SourceAborts
            | Self::Deliver(_)
            | Self::SourceRetries
            | Self::TargetRetries
            | Self::SourceSettles
            | Self::TargetSettles
            | Self::SourceRestarts
            | Self::TargetRestarts => true,
            _ => false,
        }
    }
}

impl HandOver {
    fn source_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let side = &world.source;
        let idle = side.todo.is_empty();
        match world.source_state() {
            Some(SourceState::Ours) if idle => {
                if side.qemu == Qemu::Running {
                    steps.push(Step::Park);
                }
                if side.qemu == Qemu::Stopped || self.bug == Some(Bug::DelegateUnparked) {
                    steps.push(Step::Parked);
                }
                steps.push(Step::SourceAborts);
            }
            Some(SourceState::Delegated) if idle => {
                steps.push(Step::SourceRetries);
                if side.left.words > 0 {
                    // What runs here is not ended.
                    let there = side.qemu != Qemu::Running || self.bug == Some(Bug::LeaveWhatRuns);
                    steps.extend(there.then_some(Step::SourceWord(Choice::There)));
                    // What was let go cannot be taken back.
                    steps.extend(side.book.then_some(Step::SourceWord(Choice::Here)));
                }
            }
            Some(SourceState::Withdrawing | SourceState::Returned | SourceState::Left) if idle => {
                steps.push(Step::SourceRetries);
            }
            _ => {}
        }
        if let Some(effect) = side.todo.first() {
            steps.push(Step::SourceActs(Turn::Well));
            let bad: &[Turn] = match effect {
                SourceEffect::Journal(_) | SourceEffect::Note(_) if side.left.journal > 0 => {
                    &Turn::BAD_WRITES
                }
                SourceEffect::End if side.left.journal > 0 => &[Turn::Fails],
                SourceEffect::Confirm => &[Turn::Fails],
                SourceEffect::Rollback | SourceEffect::Destroy | SourceEffect::Reclaim
                    if side.left.calls > 0 =>
                {
                    &[Turn::Fails]
                }
                _ => &[],
            };
            steps.extend(bad.iter().copied().map(Step::SourceActs));
        }
        if world.source_unsettled() {
            steps.push(Step::SourceSettles);
        }
        if side.up && side.left.crashes > 0 {
            steps.extend([false, true].map(|host| Step::SourceCrashes { host }));
        }
        if !side.up {
            steps.push(Step::SourceRestarts);
        }
        if side.left.deaths > 0 && matches!(side.qemu, Qemu::Running | Qemu::Stopped) {
            steps.push(Step::SourceQemuDies);
        }
    }

    fn target_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let side = &world.target;
        let idle = side.todo.is_empty();
        match world.target_state() {
            Some(TargetState::Receiving) if idle => {
                steps.extend([Step::TargetAborts, Step::TargetFails]);
            }
            Some(TargetState::Holding) if idle => {
                match side.qemu {
                    Qemu::Loaded => steps.push(Step::Verified),
                    // It may still come.
                    Qemu::Loading if world.holds(Message::Data) => {}
                    Qemu::Loading if self.bug == Some(Bug::HoldForEver) => {}
                    _ => steps.push(Step::TargetMissesIt),
                }
                steps.push(Step::TargetFails);
            }
            Some(TargetState::Revoking) if idle => steps.push(Step::TargetRetries),
            None if side.up && !side.ended && side.left.words > 0 => {
                let settled = side.read == Some(TargetRecord::Settled);
                steps.extend(settled.then_some(Step::TargetWord(Choice::Here)));
                let there = side.read == Some(TargetRecord::Yielded);
                steps.extend(there.then_some(Step::TargetWord(Choice::There)));
            }
            _ => {}
        }
        if let Some(effect) = side.todo.first() {
            steps.push(Step::TargetActs(Turn::Well));
            let bad: &[Turn] = match effect {
                TargetEffect::Journal(_) | TargetEffect::Note(_) if side.left.journal > 0 => {
                    &Turn::BAD_WRITES
                }
                TargetEffect::End if side.left.journal > 0 => &[Turn::Fails],
                TargetEffect::Settle
                | TargetEffect::Discard
                | TargetEffect::Pause
                | TargetEffect::Remove
                    if side.left.calls > 0 =>
                {
                    &[Turn::Fails]
                }
                TargetEffect::Run => match (side.left.deaths > 0, side.left.calls > 0) {
                    (true, true) => &[Turn::Fails, Turn::FailsLate, Turn::FailsSeen],
                    (true, false) => &[Turn::Fails],
                    (false, true) => &[Turn::FailsLate, Turn::FailsSeen],
                    (false, false) => &[],
                },
                _ => &[],
            };
            steps.extend(bad.iter().copied().map(Step::TargetActs));
        }
        if world.target_unsettled(self.bug) {
            steps.push(Step::TargetSettles);
        }
        if side.up && side.left.crashes > 0 {
            steps.extend([false, true].map(|host| Step::TargetCrashes { host }));
        }
        if !side.up {
            steps.push(Step::TargetRestarts);
        }
        if side.left.deaths > 0 && !matches!(side.qemu, Qemu::Dead | Qemu::Ended) {
            steps.push(Step::TargetQemuDies);
        }
    }

    fn deliver(&self, world: &mut World, message: Message) {
        let source_idle = world.source.todo.is_empty();
        let target_idle = world.target.todo.is_empty();
        match message {
            Message::Data if world.fresh && world.target.qemu == Qemu::Loading => {
                world.target.qemu = Qemu::Loaded;
            }
            Message::Token if world.fresh && target_idle => {
                world.feed_target(TargetEvent::Token, self.bug);
            }
            Message::Abort if world.fresh && target_idle => {
                world.feed_target(TargetEvent::Abort, self.bug);
            }
            Message::Ask(standing) if world.target.up => {
                world.ask_target(standing, self.bug);
            }
            Message::Answer(verdict) if source_idle => {
                world.feed_source(SourceEvent::Peer(verdict), self.bug);
            }
            _ => {}
        }
    }
}

impl Model for HandOver {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.left)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        self.source_steps(world, steps);
        self.target_steps(world, steps);
        for message in Message::ALL {
            if world.holds(message) {
                steps.extend([Step::Deliver(message), Step::Drop(message)]);
            }
        }
    }

    fn next_state(&self, last: &World, step: Step) -> Option<World> {
        let bug = self.bug;
        let mut world = last.clone();
        match step {
            Step::Park => {
                world.source.qemu = Qemu::Stopped;
                world.send(Message::Data);
            }
            Step::Parked => {
                if bug == Some(Bug::DelegateUnparked) {
                    world.send(Message::Data);
                }
                world.feed_source(SourceEvent::Parked, bug);
            }
            Step::SourceAborts => world.feed_source(SourceEvent::Abort, bug),
            Step::SourceActs(turn) => {
                let left = &mut world.source.left;
                if turn != Turn::Well {
                    match last.source.todo[0] {
                        SourceEffect::Rollback | SourceEffect::Destroy | SourceEffect::Reclaim => {
                            left.calls -= 1;
                        }
                        SourceEffect::Confirm => {}
                        _ => left.journal -= 1,
                    }
                }
                world.step_source(turn, bug);
            }
            Step::TargetActs(turn) => {
                let left = &mut world.target.left;
                if turn != Turn::Well {
                    match last.target.todo[0] {
                        TargetEffect::Run if turn == Turn::Fails => left.deaths -= 1,
                        TargetEffect::Journal(_) | TargetEffect::Note(_) | TargetEffect::End => {
                            left.journal -= 1;
                        }
                        _ => left.calls -= 1,
                    }
                }
                world.step_target(turn, bug);
            }
            Step::Verified => world.feed_target(TargetEvent::Verified, bug),
            Step::TargetFails | Step::TargetMissesIt => world.feed_target(TargetEvent::Failed, bug),
            Step::TargetAborts => world.feed_target(TargetEvent::Abort, bug),
            Step::Deliver(message) => self.deliver(&mut world, message),
            Step::Drop(message) => world.drop_message(message),
            Step::SourceRetries => world.feed_source(SourceEvent::Retry, bug),
            Step::TargetRetries => world.feed_target(TargetEvent::Retry, bug),
            Step::SourceSettles => world.settle_source(bug),
            Step::TargetSettles => world.settle_target(bug),
            Step::SourceCrashes { host } => {
                world.source.left.crashes -= 1;
                world.crash_source(host);
            }
            Step::TargetCrashes { host } => {
                world.target.left.crashes -= 1;
                world.crash_target(host);
            }
            Step::SourceRestarts => world.source.up = true,
            Step::TargetRestarts => world.target.up = true,
            Step::SourceQemuDies => {
                world.source.left.deaths -= 1;
                world.source.qemu = Qemu::Dead;
                world.past.crashed = true;
            }
            Step::TargetQemuDies => {
                world.target.left.deaths -= 1;
                world.past.crashed |= matches!(world.target.qemu, Qemu::Running | Qemu::Stopped);
                world.target.qemu = Qemu::Dead;
            }
            Step::SourceWord(choice) => {
                world.source.left.words -= 1;
                world.past.overridden |= choice == Choice::Here;
                world.feed_source(SourceEvent::Resolve(choice), bug);
            }
            Step::TargetWord(choice) => {
                world.target.left.words -= 1;
                world.recover_target(bug);
                world.feed_target(TargetEvent::Resolve(choice), bug);
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(
                "never both run, unless the operator wanted that",
                |_, world| {
                    let both =
                        world.source.qemu == Qemu::Running && world.target.qemu == Qemu::Running;
                    !both || world.past.overridden
                },
            ),
            Property::<Self>::always("never twice in time either", |_, world| {
                !world.past.ran_twice_in_time
            }),
            Property::<Self>::always("a target that has yielded stands still", |_, world| {
                world.target.read != Some(TargetRecord::Yielded)
                    || world.target.qemu != Qemu::Running
            }),
            Property::<Self>::always("no agent ends a guest that runs", |_, world| {
                !world.past.ended_running
            }),
            Property::<Self>::always("a word that was refused is not followed", |_, world| {
                !world.past.refused_word_followed
            }),
            Property::<Self>::always("what ran twice is shouted", |_, world| {
                let over = world.source.ended && world.target.ended;
                let twice = world.past.resumed && world.past.target_ran;
                !(over && twice) || world.past.conflict
            }),
            Property::<Self>::always(
                "a guest runs only behind a durable acceptance",
                |_, world| !world.past.ran_unaccepted,
            ),
            Property::<Self>::always("the token goes only behind a delegation", |_, world| {
                !world.past.token_sent_undelegated
            }),
            Property::<Self>::always("an abort leaves the guest running", |_, world| {
                let over = world.source.ended && !world.past.delegated;
                !over || matches!(world.source.qemu, Qemu::Running | Qemu::Dead)
            }),
            Property::<Self>::always("nothing is lost unless a hypervisor died", |_, world| {
                let over = world.source.ended && world.target.ended;
                let runs = |qemu| qemu == Qemu::Running;
                !over || world.past.crashed || runs(world.source.qemu) || runs(world.target.qemu)
            }),
            Property::<Self>::always("in the end it is one side's", |_, world| {
                let over = world.source.ended && world.target.ended;
                !over || world.source.book != world.target.book
            }),
            Property::<Self>::sometimes("it runs at the target", |_, world| {
                world.source.ended && world.target.ended && world.target.qemu == Qemu::Running
            }),
            Property::<Self>::sometimes("it is given back after the delegation", |_, world| {
                world.source.ended && world.past.resumed && !world.past.overridden
            }),
        ]
    }
}

/// What may go wrong at each side.
const fn budget([crashes, journal, calls, deaths, words]: [u8; 5]) -> Budget {
    Budget { crashes, journal, calls, deaths, words }
}

/// The bounds of the whole space.
const WHOLE: [(&str, Budget); 6] = [
    ("crashes", budget([3, 0, 0, 0, 0])),
    ("deaths", budget([2, 0, 0, 1, 0])),
    ("writes", budget([1, 2, 0, 0, 0])),
    ("faults", budget([0, 1, 1, 1, 0])),
    ("words", budget([1, 0, 1, 0, 1])),
    ("unwritten words", budget([0, 1, 1, 0, 1])),
];
/// More, which takes some minutes.
const DEEP: [(&str, Budget); 3] = [
    ("all faults", budget([1, 1, 1, 1, 0])),
    ("all but deaths and calls", budget([1, 1, 0, 0, 1])),
    ("writes that fail again and again", budget([1, 3, 0, 0, 0])),
];
/// Distinct states that the largest of them has at least.
const STATES_MIN: usize = 1_000_000;
/// In one of these each bug is found.
const SMALL: [Budget; 4] = [
    budget([0, 0, 1, 0, 1]),
    budget([1, 0, 0, 1, 0]),
    budget([0, 2, 0, 0, 1]),
    budget([1, 1, 0, 0, 0]),
];

/// Explores a space whole; gives its size, or what does not hold and how many steps lead there.
fn explore(model: HandOver) -> Result<usize, (String, Vec<Step>)> {
    let failures = HasDiscoveries::AnyFailures;
    let checker = model.checker().threads(2).finish_when(failures).spawn_bfs().join();
    let wanted = |property: &str| property.starts_with("it ");
    for (property, path) in checker.discoveries() {
        if !wanted(property) {
            return Err((property.to_owned(), path.into_actions()));
        }
    }
    if model.bug.is_none() {
        checker.assert_properties();
    }
    let (states, stuck) = graph::find_stuck(&model);
    if let Some(stuck) = stuck {
        let what =
            format!("from every state the guest gets to run at one side: {:#?}", stuck.world);
        return Err((what, stuck.steps));
    }
    assert_eq!(states, checker.unique_state_count(), "the two walks differ");
    Ok(states)
}

fn holds(spaces: &[(&str, Budget)]) {
    let (mut all, mut most) = (0, 0);
    for &(name, left) in spaces {
        let begun = Instant::now();
        match explore(HandOver { left, bug: None }) {
            Ok(states) => {
                eprintln!("{name}: {left:?}: {states} states, {:?}", begun.elapsed());
                (all, most) = (all + states, states.max(most));
            }
            Err((what, steps)) => panic!("{name}: {what}: {steps:#?}"),
        }
    }
    eprintln!("{all} states, counted once for each budget");
    assert!(most >= STATES_MIN, "{most} states are too few to mean much");
}

#[test]
fn the_whole_space_holds() {
    holds(&WHOLE);
}

#[test]
#[ignore = "takes some minutes"]
fn the_deep_space_holds() {
    holds(&DEEP);
}

#[test]
fn each_bug_is_found() {
    for bug in Bug::ALL {
        let found = SMALL.iter().find_map(|&left| explore(HandOver { left, bug: Some(bug) }).err());
        let Some((what, steps)) = found else { panic!("{bug:?} is not found") };
        let what = what.lines().next().unwrap_or_default();
        eprintln!("{bug:?}: not so: {what} ({} steps)", steps.len());
    }
}
