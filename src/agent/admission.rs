//! May this job start now?
//!
//! Invariant: pure; the answer is a function of the situation that is passed in. Never two jobs for
//! one VM, never more jobs than the limits say, never a job for a VM whose hand-over is in doubt.

use crate::control::{Failure, JobKind};

/// Migrations at a time: each has a share of the staging memory, and a share of the link that must
/// stay above its guest's dirty rate.
pub const MIGRATIONS_MAX: usize = 4;
/// Seeds at a time: they need little memory and yield to everything else.
pub const SEEDS_MAX: usize = 16;
/// Pushes at a time, and pulls.
pub const PUSHES_MAX: usize = 16;

/// A job that runs, as far as admission needs to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Occupied {
    /// What it does.
    pub kind: JobKind,
    /// The VM.
    pub vm: String,
    /// The peer's name.
    pub peer: String,
}

/// A job that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// What it would do.
    pub kind: JobKind,
    /// The VM.
    pub vm: String,
    /// Whether this host has such a VM.
    pub vm_known: bool,
    /// Whether the VM's last hand-over is in doubt.
    pub in_doubt: bool,
}

/// Decides whether `wish` may join the jobs that are `running`.
///
/// # Errors
/// It may not; the text says what to do instead.
pub fn admit(stopping: bool, running: &[Occupied], wish: &Wish) -> Result<(), Failure> {
    let Wish { kind, vm, .. } = wish;
    if stopping {
        let what = format!("cannot {kind} {vm}: the agent is stopping");
        return Err(Failure::refused(what, "try again when it runs again"));
    }
    if wish.in_doubt {
        let what = format!("cannot {kind} {vm}: its last hand-over is in doubt");
        return Err(Failure::refused(what, "`longhaul status` tells what is known about it"));
    }
    if !wish.vm_known {
        let what = format!("no VM of this host is called `{vm}`");
        return Err(Failure::refused(what, "`longhaul vm list` shows them"));
    }
    if let Some(job) = running.iter().find(|job| job.vm == *vm) {
        let what = format!(
            "cannot {kind} {vm}: a job moves it already ({} {} {})",
            job.kind,
            job.kind.preposition(),
            job.peer
        );
        let next = match job.kind {
            JobKind::Seed | JobKind::Push | JobKind::Pull => {
                format!("`longhaul cancel {vm}` first: what the target has received stays there")
            }
            JobKind::Migrate => {
                format!("`longhaul watch {vm}` follows it, `longhaul cancel {vm}` stops it")
            }
        };
        return Err(Failure::refused(what, next));
    }
    let max = match kind {
        JobKind::Migrate => MIGRATIONS_MAX,
        JobKind::Seed => SEEDS_MAX,
        JobKind::Push | JobKind::Pull => PUSHES_MAX,
    };
    if running.iter().filter(|job| job.kind == *kind).count() >= max {
        let what = format!("cannot {kind} {vm}: {max} jobs of this kind run already");
        return Err(Failure::refused(what, "wait until one has ended: `longhaul status`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wish(kind: JobKind, vm: &str) -> Wish {
        Wish { kind, vm: vm.to_owned(), vm_known: true, in_doubt: false }
    }

    #[test]
    fn refusals_say_what_to_do() {
        let running = [Occupied { kind: JobKind::Seed, vm: "db1".into(), peer: "lyon".into() }];
        let refusal = |stopping, wish: Wish| {
            let failure = admit(stopping, &running, &wish).unwrap_err();
            assert!(failure.state.is_empty() && !failure.next.is_empty());
            failure.what
        };
        let again = wish(JobKind::Migrate, "db1");
        assert_eq!(
            refusal(false, again.clone()),
            "cannot migrate db1: a job moves it already (seed to lyon)"
        );
        assert!(refusal(true, again).ends_with("the agent is stopping"));
        let other = wish(JobKind::Migrate, "db2");
        assert!(refusal(false, Wish { vm_known: false, ..other.clone() }).contains("`db2`"));
        assert!(refusal(false, Wish { in_doubt: true, ..other.clone() }).contains("in doubt"));
        assert_eq!(admit(false, &running, &other), Ok(()));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Start(JobKind, u8),
        End(u8),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let kind = prop_oneof![Just(JobKind::Seed), Just(JobKind::Migrate)];
        let op = prop_oneof![
            3 => (kind, 0u8..40).prop_map(|(kind, vm)| Op::Start(kind, vm)),
            1 => (0u8..40).prop_map(Op::End),
        ];
        prop::collection::vec(op, 0..200)
    }

    proptest! {
        #[test]
        fn limits_hold_and_free_places_are_given(ops in ops()) {
            let mut running: Vec<Occupied> = Vec::new();
            for op in ops {
                match op {
                    Op::End(vm) => running.retain(|job| job.vm != vm.to_string()),
                    Op::Start(kind, vm) => {
                        let vm = vm.to_string();
                        let busy = running.iter().any(|job| job.vm == vm);
                        let max = if kind == JobKind::Seed { SEEDS_MAX } else { MIGRATIONS_MAX };
                        let full = running.iter().filter(|job| job.kind == kind).count() >= max;
                        let admitted = admit(false, &running, &wish(kind, &vm)).is_ok();
                        prop_assert_eq!(admitted, !busy && !full);
                        if admitted {
                            running.push(Occupied { kind, vm, peer: "p".into() });
                        }
                    }
                }
            }
        }
    }
}
