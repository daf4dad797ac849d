//! Memory: pages as typed data between the hypervisor's stream here and the one there.
//!
//! Invariant: the last version of every page that the source read is the one that the target has,
//! and what the target writes to its hypervisor was checked against the BLAKE3 hashes of what the
//! source had. Everything that is not a page passes through as it is, in order.

mod blocks;
mod code;
mod pump;
mod receive;
mod send;

pub(super) use blocks::KnownBlocks;
pub(super) use pump::{Pump, Stage};
pub(super) use receive::{MemoryReceiver, MemoryWork, receive};
pub(super) use send::{MemorySender, SendState};
