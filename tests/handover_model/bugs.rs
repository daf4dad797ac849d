//! Bugs that are put in one at a time: a checker that cannot fail proves nothing.
//!
//! Invariant: they are in the model's shell and around the machines, never in the product.

/// One bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bug {
    /// The token goes out before the delegation is durable.
    TokenBeforeJournal,
    /// The source's journal says that a record is durable, and it is only in the cache.
    SourceWithoutFsync,
    /// The same at the target.
    TargetWithoutFsync,
    /// The target's guest runs before its acceptance is durable.
    RunBeforeJournal,
    /// A restarted source does not read that it has delegated.
    ForgetDelegation,
    /// A restarted target does not read that it has accepted.
    ForgetAcceptance,
    /// A source that waits too long goes on by itself.
    ResumeOnTimeout,
    /// A target that is asked while it still decides says no, and goes on.
    RefuseWhileHolding,
    /// A target does not listen to an operator who took the guest back.
    IgnoreTookBack,
    /// The source delegates while its guest runs.
    DelegateUnparked,
    /// The source ends its hypervisor as soon as the token is out.
    DestroyOnDelegation,
    /// A target whose hypervisor died before the start refuses without writing it down.
    RevokeUnwritten,
    /// A failed fsync of the acceptance counts as not written.
    UnknownIsUnwritten,
    /// A target forgets the attempt before the VM is in its book.
    EndBeforeSettled,
    /// A target runs again what it has yielded.
    RunWhatWasYielded,
    /// What can be read in a journal is acted upon, durable or not.
    BelieveUnsynced,
    /// A target that could not stop the guest which it yields tries again only after a restart.
    YieldOnlyAtRestart,
    /// It stops that guest only if it is in the book.
    PauseOnlyBooked,
    /// The operator leaves to the target what runs at the source again.
    LeaveWhatRuns,
    /// The operator is told that a word is not followed while the disk may hold it.
    PromiseUnwritten,
    /// A guest that was told to run and not seen to counts as one that has run.
    UnseenIsRun,
    /// A target with the token waits for data that cannot come any more.
    HoldForEver,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::TokenBeforeJournal,
        Self::SourceWithoutFsync,
        Self::TargetWithoutFsync,
        Self::RunBeforeJournal,
        Self::ForgetDelegation,
        Self::ForgetAcceptance,
        Self::ResumeOnTimeout,
        Self::RefuseWhileHolding,
        Self::IgnoreTookBack,
        Self::DelegateUnparked,
        Self::DestroyOnDelegation,
        Self::RevokeUnwritten,
        Self::UnknownIsUnwritten,
        Self::EndBeforeSettled,
        Self::RunWhatWasYielded,
        Self::BelieveUnsynced,
        Self::YieldOnlyAtRestart,
        Self::PauseOnlyBooked,
        Self::LeaveWhatRuns,
        Self::PromiseUnwritten,
        Self::UnseenIsRun,
        Self::HoldForEver,
    ];
}
