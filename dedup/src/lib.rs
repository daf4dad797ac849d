//! Blocks and pieces, hashing, recipes, chunk index, compression and page differences.
//!
//! Invariant: pure and synchronous. Nothing here knows a runtime, a network, a clock or a
//! hypervisor, and only [`recipe::RecipeLog`] and [`places::Places`] touch files. Bytes from a peer or a disk never
//! panic a decoder, and never make it allocate more than a limit with a name.
//!
//! ```text
//! disk --> zeros --> blocks --> chunk --> recipe, index, places      what is where
//!                               |
//!                               v
//!             summary --> offer --> bundle --> compress     what crosses the WAN
//!                           |          ^      ^
//!                         grains --> patch    |             what is only similar
//!                                             |
//! memory pages --> pages, delta --> pagebatch -+-- level   how hard to try
//! ```
//!
//! Reading order: [`id`], [`blocks`], [`chunk`], [`recipe`], [`index`], [`places`], [`summary`],
//! [`offer`], [`grains`], [`patch`], [`bundle`] for disks; [`pages`], [`delta`], [`pagebatch`] for
//! memory; [`compress`], [`lzma`] and [`level`] for both.
//!
#![doc = include_str!("../FORMAT.md")]

pub mod blocks;
pub mod bundle;
pub mod chunk;
pub mod compress;
mod cursor;
pub mod delta;
pub mod grains;
pub mod id;
pub mod index;
pub mod level;
pub mod lzma;
pub mod offer;
pub mod pagebatch;
pub mod pages;
pub mod patch;
pub mod places;
pub mod recipe;
pub mod summary;
pub mod zeros;

pub use cursor::DecodeError;
