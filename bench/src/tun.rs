//! Opens a TUN device in the calling thread's network namespace.
//!
//! Invariant: the device lives exactly as long as its file descriptors: it is never made
//! persistent, so no crash leaves one behind.
//!
//! Formats: `struct ifreq` of netdevice(7); `TUNSETIFF` and the flags of Linux'
//! Documentation/networking/tuntap.rst. This is the lab's only file with unsafe code.
#![allow(
    unsafe_code,
    reason = "TUNSETIFF takes a pointer; the proof that it is valid stands at its one call"
)]

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `IFNAMSIZ`: bytes of an interface name, the closing zero included.
const IFNAMSIZ: usize = 16;
/// A TUN device: IP packets, no Ethernet header.
const IFF_TUN: i16 = 0x0001;
/// No four bytes of flags and protocol before each packet.
const IFF_NO_PI: i16 = 0x1000;
/// `_IOW('T', 202, int)`; what it points to is a `struct ifreq` all the same.
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);

/// `struct ifreq` of a 64-bit Linux: a name and a union of 24 bytes, of which `ifr_flags` is used.
#[repr(C)]
struct IfReq {
    name: [u8; IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<IfReq>() == 40, "struct ifreq is 40 bytes");

/// Creates the device and gives its descriptor: one `read` is one packet, one `write` another.
/// Reads that would wait fail with `EAGAIN`.
///
/// # Errors
///
/// Without `/dev/net/tun` or the right to use it (`CAP_NET_ADMIN`), or when the name is taken.
pub(crate) fn open(name: &str) -> Result<OwnedFd> {
    ensure!(
        !name.is_empty() && name.len() < IFNAMSIZ && name.is_ascii(),
        "{name:?} is no interface name"
    );
    let file =
        File::options().read(true).write(true).open("/dev/net/tun").context(
            "while opening /dev/net/tun: the lab needs root and the kernel's TUN driver",
        )?;
    let mut request = IfReq { name: [0; IFNAMSIZ], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` at the pointer that it is given, and
    // keeps nothing of it. `request` is such a struct (its size is asserted above), is borrowed
    // mutably for the call and outlives it; its name ends in zero because it is shorter than
    // IFNAMSIZ and the rest was zeroed.
    unsafe { ioctl(&file, Updater::<TUNSETIFF, IfReq>::new(&mut request)) }
        .with_context(|| format!("while creating the TUN device {name}"))?;
    let fd = OwnedFd::from(file);
    let flags = fcntl_getfl(&fd).context("while reading the TUN device's flags")?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
        .context("while making the TUN device non-blocking")?;
    Ok(fd)
}
