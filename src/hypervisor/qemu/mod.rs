//! QEMU, unmodified, from 7.2 on: [`crate::hypervisor`]'s traits over QMP, NBD and its migration stream.

pub mod adopt;
pub mod args;
pub mod check;
pub mod disk;
mod extents;
pub mod host;
pub mod image;
pub mod launch;
pub mod memory;
pub mod nbd;
mod pool;
pub mod probe;
pub mod qmp;
pub mod ramstream;
pub mod run;
mod source;
mod status;
mod target;
