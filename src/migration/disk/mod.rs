//! Disks: what `seed`, `sync` and the last round of `switchover` send and receive.
//!
//! ```text
//! source (send)              target (receive, find, assemble)
//! ranges of parcels     ->   which differ
//! summaries of parcels  ->   which differ
//! pieces of those       ->   which are not here
//! blocks of those       ->   which are not here
//! runs of those blocks  ->   put together, hashed, written
//! end of the disk       ->   what did not come together: sent whole
//! ```
//! Invariant: nothing is written to a target image that was not checked against its BLAKE3 id, and
//! nothing is called present that was not read back and checked, or is vouched for by a complete
//! record of an image that nobody touched since.

mod ask;
mod assemble;
mod find;
mod layout;
mod pack;
mod recall;
mod receive;
mod record;
mod send;
#[cfg(test)]
mod tests;
mod unpack;

/// Data of parcels that the target has been asked about and that are not dealt with, at most, in MiB. With
/// three round trips of 200 ms for each this still is 200 MiB a second; with more, what the target
/// has found of them would not fit into its memory, and would be sent. A parcel with less counts as one.
const ROOM_MIB: usize = 128;

pub(super) use receive::DiskReceiver;
pub(super) use record::ImageRecord;
pub(super) use send::{DiskSender, How};
pub(super) use unpack::Unpacked;
