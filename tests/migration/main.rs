//! What holds of a whole migration, seen from outside: two agents, a real QEMU with a guest that
//! checks itself, a WAN between two network namespaces, and everything that can break on the way.
//!
//! Needs root, what `bench/setup/qemu` and `bench/guest/tiny/build` need, and `LONGHAUL_QEMU_100`
//! (and `LONGHAUL_QEMU_72` for hosts that differ); each test says what it skips. The source is
//! always QEMU 10.0: under TCG, 7.2 misses writes of its guest while it migrates.
//!
//! Invariant: faults are injected when the agent says that a phase has begun, never after a time;
//! one test runs at a time, and at its end nothing of it is left on this machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod adopted;
mod doubt;
mod faults;
mod full;
mod hooks;
mod owners;
mod planned;
mod push;
mod refusals;
mod seeds;
mod stage;
mod switchover;
mod whole;
