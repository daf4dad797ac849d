//! Disks: what `seed`, `sync` and the last round of `switchover` send and receive.
//!
//! Invariant: nothing is written to a target image that was not checked against its BLAKE3 id, and
//! nothing is called present that was not read back and checked.

mod receive;
mod record;
mod send;

pub(super) use receive::DiskReceiver;
pub(super) use record::ImageRecord;
pub(super) use send::{DiskSender, How};
