//! A running hypervisor seen from outside: its folder, its files, its process.
//!
//! Invariant: a process is named by its id and its start time together, and signals go through a
//! descriptor that was checked against both: an id that the kernel gave to somebody else since is
//! never signalled.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, sleep};

use crate::hypervisor::HypervisorError;
use crate::hypervisor::spec::validate::{NAME_BYTES_MAX, is_name};

/// Unix socket paths that are this long or longer do not fit into a socket address.
const SOCKET_PATH_BYTES: usize = 108;

/// How often an ending process is looked at.
const END_POLL: Duration = Duration::from_millis(10);

/// Longest command line that is read; the kernel's own limit for one argument is 128 KiB.
const CMDLINE_BYTES_MAX: usize = 2 << 20;

/// Where everything of one running VM is, on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPaths {
    /// The VM's own folder.
    pub dir: PathBuf,
    /// The monitor's socket.
    pub qmp: PathBuf,
    /// The process id, written and locked by QEMU.
    pub pid: PathBuf,
    /// QEMU's messages.
    pub log: PathBuf,
    /// What was started: the description.
    pub record: PathBuf,
    /// The socket of the guest's agent.
    pub guest_agent: PathBuf,
    /// A socket for the migration stream.
    pub migration: PathBuf,
    /// A socket for disk exports.
    pub nbd: PathBuf,
}

impl RunPaths {
    /// The paths for VM `name` below `run_dir`. Creates nothing.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the name is none, or socket paths would get too long.
    pub fn new(run_dir: &Path, name: &str) -> Result<Self, HypervisorError> {
        let unsupported = |reason| HypervisorError::Unsupported { vm: name.to_owned(), reason };
        if !is_name(name, NAME_BYTES_MAX) {
            return Err(unsupported("its name is no plain name".to_owned()));
        }
        let dir = std::path::absolute(run_dir).map_err(|source| HypervisorError::Io {
            doing: format!("{name}: finding its run folder below {}", run_dir.display()),
            source,
        })?;
        let dir = dir.join(name);
        let paths = Self {
            qmp: dir.join("qmp.sock"),
            pid: dir.join("qemu.pid"),
            log: dir.join("qemu.log"),
            record: dir.join("vm.json"),
            guest_agent: dir.join("agent.sock"),
            migration: dir.join("migration.sock"),
            nbd: dir.join("nbd.sock"),
            dir,
        };
        let longest = paths.migration.as_os_str().len();
        if longest >= SOCKET_PATH_BYTES {
            return Err(unsupported(format!(
                "its socket {} would have a path of {longest} bytes and {} is the most: choose a \
                 shorter run_dir or name",
                paths.migration.display(),
                SOCKET_PATH_BYTES - 1
            )));
        }
        Ok(paths)
    }

    /// The socket of the serial port with that position.
    pub fn serial_socket(&self, nth: usize) -> PathBuf {
        self.dir.join(format!("serial{nth}.sock"))
    }

    /// What the guest wrote to the serial port with that position.
    pub fn serial_log(&self, nth: usize) -> PathBuf {
        self.dir.join(format!("serial{nth}.log"))
    }
}

/// A process, told apart from later ones with the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// When it started, in clock ticks since the kernel's start.
    started: u64,
}

/// Start time and state letter of a process, from `/proc/PID/stat` (see proc(5)).
fn stat(pid: i32) -> Option<(u64, u8)> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold anything.
    let after_name = &text[text.iter().rposition(|&b| b == b')')? + 1..];
    let fields: Vec<&str> = std::str::from_utf8(after_name).ok()?.split_whitespace().collect();
    let state = *fields.first()?.as_bytes().first()?;
    Some((fields.get(19)?.parse().ok()?, state))
}

impl Process {
    /// The process that has this id now.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid)
            .filter(|(_, state)| !b"ZX".contains(state))
            .map(|(started, _)| Self { pid, started })
    }

    /// Whether it still runs; one that ended and waits to be noticed does not.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Its command line.
    pub fn arguments(&self) -> io::Result<Vec<String>> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid))?;
        if bytes.len() > CMDLINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its command line is too long"));
        }
        let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        Ok(text.split(|&b| b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect())
    }

    /// A descriptor of it, `None` if it has ended.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The descriptor holds on to whoever has the id now. If that is not it, it has ended.
        Ok(self.is_alive().then_some(fd))
    }

    /// Asks it to end (`SIGTERM`), or ends it (`SIGKILL`).
    ///
    /// # Errors
    ///
    /// The kernel's, such as a lack of rights. That it has ended already is none.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.open()? {
            Some(fd) => match pidfd_send_signal(fd, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
                Err(e) => Err(e.into()),
            },
            None => Ok(()),
        }
    }

    /// Waits until it has ended; false if it still runs after `limit`. It need not be our child.
    pub async fn wait_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(END_POLL).await;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_that_cannot_work_are_refused() {
        let paths = RunPaths::new(Path::new("/run/longhaul/vm"), "web1").unwrap();
        assert_eq!(paths.qmp, Path::new("/run/longhaul/vm/web1/qmp.sock"));
        let deep = format!("/{}", "x".repeat(100));
        let said = RunPaths::new(Path::new(&deep), "web1").unwrap_err().to_string();
        assert!(said.contains("shorter run_dir"), "{said}");
        assert!(RunPaths::new(Path::new("/run"), "../web1").is_err());
    }

    #[tokio::test]
    async fn a_process_is_followed_to_its_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id() as i32).unwrap();
        assert!(process.is_alive());
        assert!(!process.wait_end(Duration::from_millis(1)).await);
        assert_eq!(process.arguments().unwrap(), ["sleep", "60"]);
        let impostor = Process { started: process.started + 1, ..process };
        assert!(!impostor.is_alive());
        impostor.signal(Signal::KILL).unwrap();
        assert!(process.is_alive(), "a signal for another process with the same id went astray");
        process.signal(Signal::KILL).unwrap();
        assert!(process.wait_end(Duration::from_secs(20)).await);
        assert!(!process.is_alive(), "ended, though nobody has waited for it yet");
        child.wait().unwrap();
        process.signal(Signal::KILL).unwrap();
    }
}
