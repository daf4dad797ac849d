//! The two network namespaces of a WAN, their devices and addresses.
//!
//! Invariant: a [`Pair`] removes what it made when it is dropped, and only that: the namespaces
//! `lh-NAME-a` and `lh-NAME-b` and the processes that still are in them. Nothing outside of them is
//! configured: no route, no address, no setting of the host.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::profile::Profile;
use crate::tun;

/// One end of a WAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[derive(clap::ValueEnum)]
pub enum Side {
    /// Where a VM comes from, by habit.
    A,
    /// Where it goes.
    B,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// `a` or `b`.
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// The address of this end. Every WAN has the same two: they exist in its namespaces only.
    pub fn address(self) -> std::net::Ipv4Addr {
        match self {
            Self::A => std::net::Ipv4Addr::new(10, 93, 0, 1),
            Self::B => std::net::Ipv4Addr::new(10, 93, 0, 2),
        }
    }
}

/// The TUN device's name in each namespace.
pub const DEVICE: &str = "wan0";
/// Longest name of a WAN: with prefix and suffix it stays readable in every listing.
const NAME_BYTES_MAX: usize = 24;
/// Packets that the kernel keeps for the relay. It must hold what a host sends while the relay is
/// not scheduled: the model's queue decides about drops, not this one.
const DEVICE_QUEUE_PACKETS: u32 = 32_768;
/// Largest TCP buffer in the namespaces: several bandwidth-delay products of every profile.
const TCP_BUFFER_BYTES_MAX: u32 = 64 << 20;
/// How long processes in a namespace have to end after SIGTERM.
const TERMINATE_WAIT: Duration = Duration::from_secs(3);

/// The namespace of one end of the WAN `name`.
pub fn namespace(name: &str, side: Side) -> String {
    format!("lh-{name}-{}", side.letter())
}

/// Where iproute2 keeps that namespace.
pub fn namespace_path(name: &str, side: Side) -> PathBuf {
    PathBuf::from("/run/netns").join(namespace(name, side))
}

/// Refuses a name that could mean another file or namespace.
///
/// # Errors
///
/// When it is not 1 to 24 lower-case letters, digits and dashes.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
        "{name:?} is no name for a WAN: use up to {NAME_BYTES_MAX} of a-z, 0-9 and -"
    );
    Ok(())
}

/// Moves the calling thread into one end of the WAN `name`. Threads and processes that it starts
/// are there as well; others are not.
///
/// # Errors
///
/// When that WAN is not up, or without the right to (`CAP_SYS_ADMIN`).
pub fn enter(name: &str, side: Side) -> Result<()> {
    let path = namespace_path(name, side);
    let file = File::open(&path)
        .with_context(|| format!("while opening {}: is the WAN {name} up?", path.display()))?;
    move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("while entering the namespace {}", namespace(name, side)))
}

/// Runs `work` in a thread of its own at one end of the WAN `name`: its sockets belong there, also
/// after the thread ended.
///
/// # Errors
///
/// When the namespace cannot be entered; else what `work` says.
pub fn inside<T: Send>(
    name: &str,
    side: Side,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(name, side)?;
            work()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Both namespaces with a TUN device in each.
#[derive(Debug)]
pub struct Pair {
    name: String,
}

impl Pair {
    /// Makes the namespaces and devices and configures them; gives the devices' descriptors.
    ///
    /// # Errors
    ///
    /// When a namespace of that name exists, without root, or without `ip` (iproute2). What was
    /// made before the failure is removed.
    pub fn create(name: &str, profile: &Profile) -> Result<(Self, [OwnedFd; 2])> {
        check_name(name)?;
        for side in Side::BOTH {
            ensure!(
                !namespace_path(name, side).exists(),
                "the namespace {} exists already: `lab wan down --name {name}` removes it",
                namespace(name, side)
            );
        }
        let pair = Self { name: name.to_owned() };
        let a = pair.create_side(Side::A, profile)?;
        let b = pair.create_side(Side::B, profile)?;
        Ok((pair, [a, b]))
    }

    fn create_side(&self, side: Side, profile: &Profile) -> Result<OwnedFd> {
        let namespace = namespace(&self.name, side);
        ip(&["netns", "add", &namespace])?;
        let device = inside(&self.name, side, || {
            for (key, value) in settings() {
                // Not every kernel lets a namespace set every one; what counts is recorded in the
                // result rows from the namespace itself.
                let _ = std::fs::write(format!("/proc/sys/{key}"), value);
            }
            tun::open(DEVICE)
        })?;
        let (local, peer) = (side.address().to_string(), side.other().address().to_string());
        let (mtu, queue) = (profile.mtu.to_string(), DEVICE_QUEUE_PACKETS.to_string());
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        ip(&["-n", &namespace, "addr", "add", &local, "peer", &peer, "dev", DEVICE])?;
        ip(&["-n", &namespace, "link", "set", DEVICE, "mtu", &mtu, "txqueuelen", &queue, "up"])?;
        Ok(device)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Settings of a namespace, as paths below `/proc/sys`.
fn settings() -> [(&'static str, String); 7] {
    let buffers = |default: u32| format!("4096 {default} {TCP_BUFFER_BYTES_MAX}");
    [
        // Neighbour and router discovery would be in the packet counts.
        ("net/ipv6/conf/all/disable_ipv6", "1".to_owned()),
        ("net/ipv6/conf/default/disable_ipv6", "1".to_owned()),
        ("net/ipv4/tcp_rmem", buffers(131_072)),
        ("net/ipv4/tcp_wmem", buffers(65_536)),
        ("net/core/rmem_max", TCP_BUFFER_BYTES_MAX.to_string()),
        ("net/core/wmem_max", TCP_BUFFER_BYTES_MAX.to_string()),
        // BBR where the kernel has it; else the write fails and the kernel's own default stays.
        ("net/ipv4/tcp_congestion_control", "bbr".to_owned()),
    ]
}

/// TCP's congestion control at one end of the WAN `name`.
///
/// # Errors
///
/// When that WAN is not up.
pub fn congestion_control(name: &str, side: Side) -> Result<String> {
    inside(name, side, || {
        let path = "/proc/sys/net/ipv4/tcp_congestion_control";
        let text =
            std::fs::read_to_string(path).with_context(|| format!("while reading {path}"))?;
        Ok(text.trim().to_owned())
    })
}

/// Ends the processes in the namespaces of the WAN `name` and removes the namespaces. What is not
/// there is fine; what cannot be removed is said on stderr, and the rest is still removed.
pub fn remove(name: &str) {
    for side in Side::BOTH {
        if !namespace_path(name, side).exists() {
            continue;
        }
        let namespace = namespace(name, side);
        let gone = end_processes(&namespace).and_then(|()| ip(&["netns", "del", &namespace]));
        if let Err(error) = gone {
            eprintln!("lab: the namespace {namespace} was not removed: {error:#}");
        }
    }
}

/// SIGTERM, then SIGKILL after a while, to every process in a namespace of ours but this one.
fn end_processes(namespace: &str) -> Result<()> {
    let pids = || -> Result<Vec<Pid>> {
        let text = ip(&["netns", "pids", namespace])?;
        let own = rustix::process::getpid();
        Ok(text
            .split_whitespace()
            .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
            .filter(|pid| *pid != own)
            .collect())
    };
    for signal in [Signal::TERM, Signal::KILL] {
        let victims = pids()?;
        for pid in &victims {
            let _ = kill_process(*pid, signal);
        }
        let deadline = Instant::now() + TERMINATE_WAIT;
        while victims.iter().any(|pid| test_kill_process(*pid).is_ok()) && !pids()?.is_empty() {
            if Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let left = pids()?;
    ensure!(left.is_empty(), "processes {left:?} do not end");
    Ok(())
}

/// Runs iproute2 and gives its output.
fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("while running ip: the lab needs iproute2")?;
    if !output.status.success() {
        bail!(
            "ip {} failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether this process may make WANs: root, TUN and iproute2 are there. For tests, which say that
/// they were skipped and why.
///
/// # Errors
///
/// What is missing.
pub fn is_possible() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "network namespaces need root");
    ensure!(std::path::Path::new("/dev/net/tun").exists(), "there is no /dev/net/tun");
    ip(&["-V"]).map(|_| ())
}

/// Whether the test of that name cannot run here; says why.
pub fn is_skipped(test: &str) -> bool {
    let possible = is_possible();
    if let Err(reason) = &possible {
        eprintln!("SKIPPED {test}: {reason:#}");
    }
    possible.is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_are_refused() {
        for bad in ["", "../x", "a/b", "UPPER", "a b", &"x".repeat(25)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("nightly-3").unwrap();
    }
}
