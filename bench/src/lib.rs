//! The lab: an emulated WAN between two network namespaces, and what is measured through it.
//!
//! Every number in the README comes from here and can be repeated. Reading order: [`profile`] (what
//! a WAN is like), [`link`] (the model of one direction), [`relay`] (packets through two of them),
//! [`netns`] and [`wan`] (where they run and how they are controlled), [`speed`] (what gets through),
//! [`transfer`] (what a transport makes of it, ours beside its rivals'); then [`guest`] and [`watch`] (who is moved and how it proves that it is well), [`host`] (the
//! product) and [`rival`] (what it is compared to), [`run`] (one measurement, whole; on memory from `warm`), [`row`] (what
//! is written down), [`push`] (images without a guest). Apart from all that: [`chunks`] (ways to cut disk
//! images, compared without a WAN) and [`simulate`] (recorded days under schedulers' rules).

mod agent;
pub mod chunks;
pub mod fleet;
pub mod guest;
pub mod host;
pub mod interrupt;
pub mod link;
pub mod netns;
mod process;
pub mod profile;
pub mod push;
pub mod qmp;
pub mod relay;
pub mod rival;
pub mod row;
pub mod run;
pub mod simulate;
pub mod slow;
pub mod speed;
pub mod transfer;
mod trouble;
mod tun;
pub mod wan;
mod warm;
pub mod watch;
