//! What the machines do in every state on every event: printed, and held against the docs.
//!
//! Invariant: `docs/hand-over.md` has the tables as they are; `LONGHAUL_BLESS=1` writes them anew.

use super::*;

const SOURCE_STATES: [SourceState; 12] = [
    SourceState::Ours,
    SourceState::Delegating,
    SourceState::Delegated,
    SourceState::Kept,
    SourceState::Gone,
    SourceState::TakingBack,
    SourceState::TookBack,
    SourceState::Returned,
    SourceState::GivingUp,
    SourceState::GaveUp,
    SourceState::Left,
    SourceState::Withdrawing,
];
const SOURCE_EVENTS: [SourceEvent; 12] = [
    SourceEvent::Parked,
    SourceEvent::Abort,
    SourceEvent::Journaled,
    SourceEvent::Unwritten,
    SourceEvent::JournalFailed,
    SourceEvent::Peer(Verdict::Runs),
    SourceEvent::Peer(Verdict::Refused),
    SourceEvent::Peer(Verdict::Undecided),
    SourceEvent::Resolve(Choice::Here),
    SourceEvent::Resolve(Choice::There),
    SourceEvent::Restarted,
    SourceEvent::Retry,
];
const TARGET_STATES: [TargetState; 12] = [
    TargetState::Receiving,
    TargetState::Holding,
    TargetState::Accepting,
    TargetState::Starting,
    TargetState::Owner,
    TargetState::Settled,
    TargetState::Refusing,
    TargetState::Revoking,
    TargetState::Refused,
    TargetState::GivingWay,
    TargetState::Yielding,
    TargetState::Yielded,
];
const TARGET_EVENTS: [TargetEvent; 17] = [
    TargetEvent::Token,
    TargetEvent::Verified,
    TargetEvent::Failed,
    TargetEvent::Abort,
    TargetEvent::Journaled,
    TargetEvent::Unwritten,
    TargetEvent::JournalFailed,
    TargetEvent::Ran,
    TargetEvent::NeverRan,
    TargetEvent::MayHaveRun,
    TargetEvent::Asked(Standing::Waits),
    TargetEvent::Asked(Standing::TookBack),
    TargetEvent::Confirmed,
    TargetEvent::Resolve(Choice::Here),
    TargetEvent::Resolve(Choice::There),
    TargetEvent::Restarted,
    TargetEvent::Retry,
];

/// The rows of a table in which something happens.
fn table(title: &str, rows: impl Iterator<Item = [String; 4]>) -> String {
    let mut text = format!("| {title} | event | next | effects, in order |\n|-|-|-|-|\n");
    let mut last = String::new();
    for [state, event, next, effects] in rows {
        let shown = if state == last { "" } else { &state };
        let next = if state == next { "" } else { &next };
        text += &format!("| {shown} | {event} | {next} | {effects} |\n");
        last = state;
    }
    text
}

fn row<E: std::fmt::Debug>(
    [state, event, next]: [&dyn std::fmt::Debug; 3],
    effects: &[E],
) -> Option<[String; 4]> {
    let [state, event, next] = [state, event, next].map(|shown| format!("{shown:?}"));
    let effects: Vec<String> = effects.iter().map(|effect| format!("{effect:?}")).collect();
    (state != next || !effects.is_empty()).then(|| [state, event, next, effects.join(", ")])
}

fn source_table() -> String {
    let all = SOURCE_STATES.iter().flat_map(|&state| SOURCE_EVENTS.map(|event| (state, event)));
    table(
        "source",
        all.filter_map(|(state, event)| {
            let mut source = Source::at(state);
            let effects = source.on(event);
            row([&state, &event, &source.state()], &effects)
        }),
    )
}

fn target_table() -> String {
    let all = TARGET_STATES.iter().flat_map(|&state| TARGET_EVENTS.map(|event| (state, event)));
    table(
        "target",
        all.filter_map(|(state, event)| {
            let mut target = Target::at(state);
            let effects = target.on(event);
            row([&state, &event, &target.state()], &effects)
        }),
    )
}

#[test]
fn the_tables_are_drawn_in_the_docs() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/hand-over.md");
    let text = std::fs::read_to_string(page).unwrap();
    let mut drawn = text.clone();
    for (name, table) in [("source", source_table()), ("target", target_table())] {
        let (from, to) = (format!("<!-- table: {name} -->\n"), "<!-- end of table -->");
        let start = drawn.find(&from).unwrap() + from.len();
        let end = start + drawn[start..].find(to).unwrap();
        drawn.replace_range(start..end, &table);
    }
    if std::env::var_os("LONGHAUL_BLESS").is_some() {
        std::fs::write(page, &drawn).unwrap();
    } else {
        assert_eq!(drawn, text, "run this test with LONGHAUL_BLESS=1 and look at what changed");
    }
}

#[test]
fn a_delegated_source_runs_again_only_after_a_refusal() {
    for event in SOURCE_EVENTS {
        let effects = Source::at(SourceState::Delegated).on(event);
        let resumes = effects.contains(&SourceEffect::Rollback);
        assert_eq!(resumes, event == SourceEvent::Peer(Verdict::Refused), "{event:?}");
    }
}

#[test]
fn no_timer_starts_a_guest() {
    for state in SOURCE_STATES {
        let effects = Source::at(state).on(SourceEvent::Retry);
        assert!(!effects.contains(&SourceEffect::Rollback), "{state:?}: {effects:?}");
    }
    for state in TARGET_STATES {
        let effects = Target::at(state).on(TargetEvent::Retry);
        assert!(!effects.contains(&TargetEffect::Run), "{state:?}: {effects:?}");
    }
}

#[test]
fn a_target_runs_only_behind_an_acceptance() {
    for state in TARGET_STATES {
        for event in TARGET_EVENTS {
            if Target::at(state).on(event).contains(&TargetEffect::Run) {
                let is_behind = matches!(
                    (state, event),
                    (TargetState::Accepting, TargetEvent::Journaled)
                        | (TargetState::Starting, TargetEvent::Restarted)
                );
                assert!(is_behind, "{state:?} {event:?}");
            }
        }
    }
}
