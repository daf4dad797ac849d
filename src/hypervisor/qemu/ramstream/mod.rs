//! QEMU's migration stream: taken apart at the source, written anew at the target.
//!
//! Invariant: pure code; bytes in, events out, and back. Sockets are [`super::memory`]'s.
//!
//! The stream is one string of elements on one socket: a head, the machine's configuration, sections
//! of handlers that have live state (memory above all), then, with the guest paused, one section per
//! device, an end mark and a description of it all. Sections carry no length, so only memory is
//! parsed; the rest is passed through, and so is everything after the first thing that is not
//! understood. Source of the format: QEMU's `migration/savevm.c` and `migration/ram.c`.
//!
//! Reading order: `wire` (numbers), [`Parser`], [`Writer`], `ending` (how a cut is noticed).

mod doubt;
mod ending;
mod layout;
mod parser;
mod wire;
mod writer;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;

pub use doubt::{Doubt, LayoutFault, StreamCut, WriteError};
pub use layout::REGIONS_MAX;
pub use parser::{OPAQUE_BYTES_MAX, Parser};
pub use writer::{SECTION_RECORDS_MAX, Writer};
