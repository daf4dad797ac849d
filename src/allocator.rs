//! What the agent asks of the system's allocator.
//!
//! Parcels and bundles are buffers of some MiB that one thread makes and another lets go. glibc moves the
//! size from which it gives such buffers back to the system up to 32 MiB as it sees them, and then keeps
//! them in the heap of whichever thread made them: a push of 1.2 GiB left an agent with 624 MiB, with the
//! size fixed with 264 MiB.
//!
//! Invariant: called before there is another thread.
#![allow(
    unsafe_code,
    reason = "mallopt has no safe form, and was measured to halve an agent's memory"
)]

/// From this size on, buffers are the system's again as soon as they are let go. Smaller ones, which
/// there are many of, would cost a page fault for each of their pages.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GIVEN_BACK_FROM_BYTES: i32 = 4 << 20;

/// Has large buffers given back to the system when they are let go. Where that cannot be asked for,
/// nothing changes but the memory that is held.
pub fn give_large_buffers_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt(3) reads two integers and keeps one of them; it is unsafe only beside another
    // thread that allocates for the first time, and main calls this before it makes any.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVEN_BACK_FROM_BYTES);
    }
}
