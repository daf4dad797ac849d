//! What a move is: phases, decisions, the hand-over and the report.
//!
//! Invariant: before the hand-over any failure leaves the guest running at the source; after it
//! only the target may run it. Knows hypervisors by their traits only.
//!
//! ```text
//!  source::run                                target::serve
//!    open ------------------------------------> admit, open images
//!    seed    disk_full   -> offers, chunks ---> DiskReceiver
//!    sync    disk_delta  -> chunks -----------> DiskReceiver
//!    prepare ---------------------------------> start a hypervisor that waits
//!    pre-copy  Pump -> Stage -> MemorySender -> MemoryReceiver -> its memory stream
//!    switchover  pause, last delta, last pages, device state
//!    settle  journal Delegated, token --------> checks, journal Accepted, run
//!            journal Gone, destroy <----------- verdict
//! ```
//!
//! Pure, to be read first: [`handover`] (who may run the VM), [`converge`] (when to switch over),
//! [`staging`] (what waits), [`message`] (what is said).

mod attempts;
mod coders;
mod coding;
pub mod converge;
mod disk;
pub mod doubts;
mod error;
pub mod handover;
mod items;
pub mod job;
pub mod journal;
pub mod known;
mod link;
mod memory;
pub mod message;
mod meter;
mod points;
mod push;
mod question;
pub mod report;
pub mod seeds;
mod settle;
mod source;
pub mod staging;
mod target;

pub use attempts::Attempts;
pub use coding::Coding;
pub use error::{MigrationError, chain};
pub use push::push;
pub use question::{Answers, ask};
pub use report::{Completed, Phase, Progress};
pub use settle::recover;
pub use source::{obstacles, run};
pub use target::serve;
