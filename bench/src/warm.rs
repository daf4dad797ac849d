//! Memory that was touched, to be given back just before a measurement.
//!
//! Invariant: the same for every tool, and never more than half of what is available.
//!
//! The host of a virtual machine may hand memory out page by page when it is first touched, and take
//! back what is free for some seconds. On the machines that this lab ran on a first touch cost 9
//! microseconds a page and any later one 1.5 (0.4 in huge pages), so that a move paid for its
//! target's memory by what had run before it. Hosts that run VMs have their memory. The kernel keeps
//! huge pages and small ones apart: each is warmed by its own kind.

use anyhow::{Context, Result};
use memmap2::{Advice, MmapMut};

use crate::row::Host;

const SMALL_PAGE_BYTES: usize = 4096;

/// Memory that this machine really has, as long as this value lives and for some seconds after.
#[derive(Debug)]
pub(crate) struct Warm {
    _touched: [MmapMut; 2],
}

impl Warm {
    /// Touches so many bytes in huge pages (where the kernel gives them) and in small ones.
    ///
    /// # Errors
    ///
    /// When there is no such memory.
    pub(crate) fn touch(huge_bytes: u64, small_bytes: u64) -> Result<Self> {
        let most = Host::available_bytes()? / 4;
        Ok(Self {
            _touched: [
                touched(huge_bytes.min(most), Advice::HugePage)?,
                touched(small_bytes.min(most), Advice::NoHugePage)?,
            ],
        })
    }
}

fn touched(bytes: u64, pages: Advice) -> Result<MmapMut> {
    let mut memory = MmapMut::map_anon(usize::try_from(bytes)?.max(1))
        .with_context(|| format!("while taking {bytes} bytes of memory"))?;
    // A kernel without huge pages has small ones for everybody.
    let _ = memory.advise(pages);
    memory.iter_mut().step_by(SMALL_PAGE_BYTES).for_each(|byte| *byte = 1);
    Ok(memory)
}
