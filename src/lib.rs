//! Longhaul moves running virtual machines between data centres over the public internet.
//!
//! Imports go one way, and `tests/tidy.rs` holds it:
//! main -> {cli, agent} -> control -> migration -> {hypervisor, transport} -> dedup.
//!
//! Reading order: [`migration`] (what a move is), [`hypervisor`] (what it asks of a hypervisor and
//! how QEMU answers), [`agent`] (the daemon around it), [`control`] (how commands talk to it),
//! [`cli`] (the commands). Beside them: [`config`] (what an operator set), [`calendar`] (caps that
//! follow the clock), [`units`] (how amounts are written) and [`allocator`].

pub mod agent;
pub mod allocator;
pub mod calendar;
pub mod cli;
pub mod config;
pub mod control;
pub mod hypervisor;
pub mod migration;
pub mod units;
