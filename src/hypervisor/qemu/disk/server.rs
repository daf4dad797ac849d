//! The NBD server inside QEMU, of which a QEMU has at most one: ours, or one that its owner runs.
//!
//! Invariant: only a server of ours is ever stopped (its socket's file name says so), and only if
//! nobody else put exports on it meanwhile.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::listeners::listeners;
use super::nodes::{self, PREFIX};
use crate::hypervisor::HypervisorError;
use crate::hypervisor::qemu::nbd::client::address_greets;
use crate::hypervisor::qemu::nbd::{NbdAddress, NbdClient, NbdError};
use crate::hypervisor::qemu::qmp::Qmp;

/// Longest path of a unix socket on Linux, in bytes.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Connections that our server takes beyond those of the disks: probes and the like.
const SPARE_CONNECTIONS: usize = 8;
/// Rounds whose views are open at a time.
pub(super) const OPEN_ROUNDS_MAX: usize = 4;
/// Connections for each disk: extents and content of every open round.
const CONNECTIONS_PER_DISK: usize = 2 * OPEN_ROUNDS_MAX;

/// How to reach the server.
#[derive(Debug)]
pub(super) struct Server {
    /// One address, or several of which one has our exports.
    addresses: Vec<NbdAddress>,
}

/// What [`Place::start`] needs to know.
pub(super) struct Place<'a> {
    /// The monitor.
    pub(super) qmp: &'a Qmp,
    /// Folder for the socket, private to us and QEMU.
    pub(super) run_dir: &'a Path,
    /// QEMU's process.
    pub(super) pid: Option<u32>,
    /// How many disks there are.
    pub(super) disks: usize,
}

impl Place<'_> {
    /// Where our server's socket lies.
    pub(super) fn socket(&self) -> PathBuf {
        self.run_dir.join(format!("{PREFIX}nbd-{}.sock", self.pid.unwrap_or(0)))
    }

    fn unsupported(&self, reason: String) -> HypervisorError {
        HypervisorError::Unsupported { vm: self.qmp.vm().to_owned(), reason }
    }

    /// Starts our server, or finds the one that runs already.
    pub(super) async fn start(&self) -> Result<Server, HypervisorError> {
        let socket = self.socket();
        let text = socket.to_str().filter(|text| text.len() <= SOCKET_PATH_BYTES_MAX);
        let Some(text) = text else {
            return Err(self.unsupported(format!(
                "the socket path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes or not UTF-8: \
                 choose a shorter folder for sockets",
                socket.display()
            )));
        };
        let arguments = json!({
            "addr": { "type": "unix", "data": { "path": text } },
            "max-connections": self.disks * CONNECTIONS_PER_DISK + SPARE_CONNECTIONS,
        });
        match self.qmp.execute("nbd-server-start", arguments.clone()).await {
            Ok(_) => return Ok(Server { addresses: vec![NbdAddress::Unix(socket)] }),
            Err(HypervisorError::Refused { detail, .. }) if detail.contains("already running") => {}
            Err(error) => return Err(error),
        }
        // Either its owner's, or ours from an attempt that ended without cleaning up.
        let addresses = self.find().await?;
        if addresses.iter().any(is_ours) && !self.has_foreign_exports().await? {
            self.qmp.execute("nbd-server-stop", Value::Null).await?;
            self.qmp.execute("nbd-server-start", arguments).await?;
            return Ok(Server { addresses: vec![NbdAddress::Unix(socket)] });
        }
        tracing::info!(vm = self.qmp.vm(), ?addresses, "using the NBD server that runs already");
        Ok(Server { addresses })
    }

    /// Stops the server if it is ours and carries nobody else's exports; removes its socket.
    pub(super) async fn stop(&self) -> Result<(), HypervisorError> {
        let socket = self.socket();
        if self.listens_at_ours().await {
            if self.has_foreign_exports().await? {
                tracing::warn!(
                    vm = self.qmp.vm(),
                    socket = %socket.display(),
                    "others use the NBD server that was started here: it is left running"
                );
                return Ok(());
            }
            match self.qmp.execute("nbd-server-stop", Value::Null).await {
                Ok(_) => {}
                Err(HypervisorError::Refused { detail, .. }) if detail.contains("not running") => {}
                Err(error) => return Err(error),
            }
        }
        self.remove_socket()
    }

    /// Removes the socket's file: for a QEMU that is gone, or stopped its server.
    pub(super) fn remove_socket(&self) -> Result<(), HypervisorError> {
        let socket = self.socket();
        match std::fs::remove_file(&socket) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                let doing = format!("removing the socket {}", socket.display());
                Err(HypervisorError::Io { doing, source })
            }
            _ => Ok(()),
        }
    }

    /// Whether QEMU listens at a socket of ours; by its process if we know it, else by asking.
    async fn listens_at_ours(&self) -> bool {
        if let Some(pid) = self.pid
            && let Ok(found) = listeners(pid).await
        {
            return found.iter().any(is_ours);
        }
        address_greets(&NbdAddress::Unix(self.socket())).await
    }

    async fn has_foreign_exports(&self) -> Result<bool, HypervisorError> {
        let exports = nodes::exports(self.qmp).await?;
        Ok(exports.iter().any(|e| e.kind == "nbd" && !e.id.starts_with(PREFIX)))
    }

    /// Looks for the server among the sockets at which QEMU listens.
    async fn find(&self) -> Result<Vec<NbdAddress>, HypervisorError> {
        let Some(pid) = self.pid else {
            return Err(self.unsupported(
                "an NBD server runs in this QEMU already and its process is unknown, so its \
                 socket cannot be found: stop that server"
                    .to_owned(),
            ));
        };
        let candidates = listeners(pid).await.map_err(|source| HypervisorError::Io {
            doing: format!("{}: looking for the NBD server of process {pid}", self.qmp.vm()),
            source,
        })?;
        // To connect to a character device can mean something to it: a debugger's port would pause
        // the guest. All of those are known by name.
        let chardevs = self.qmp.execute("query-chardev", Value::Null).await?;
        let chardevs: Vec<&str> = chardevs
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c.get("filename").and_then(Value::as_str))
            .collect();
        let mut found = Vec::new();
        for address in candidates {
            if is_ours(&address) {
                return Ok(vec![address]);
            }
            if !is_chardev(&address, &chardevs) && address_greets(&address).await {
                found.push(address);
            }
        }
        if found.is_empty() {
            return Err(self.unsupported(format!(
                "an NBD server runs in this QEMU already, but none answers at the sockets of \
                 process {pid}: stop that server, or let it listen on a unix socket"
            )));
        }
        Ok(found)
    }
}

impl Server {
    /// Connects to one of our exports.
    pub(super) async fn connect(
        &mut self,
        export: &str,
        context: &str,
    ) -> Result<NbdClient, NbdError> {
        let mut refusal = NbdError::NoExport { export: export.to_owned() };
        for index in 0..self.addresses.len() {
            match NbdClient::connect(&self.addresses[index], export, &[context]).await {
                Ok(client) => {
                    // The first one is tried first the next time.
                    self.addresses.swap(0, index);
                    return Ok(client);
                }
                // Perhaps another process's server; the next one may be QEMU's.
                Err(error @ NbdError::NoExport { .. }) => refusal = error,
                Err(error) => return Err(error),
            }
        }
        Err(refusal)
    }

    /// Whether it still answers.
    pub(super) async fn answers(&self) -> bool {
        match self.addresses.first() {
            Some(address) => address_greets(address).await,
            None => false,
        }
    }
}

fn is_ours(address: &NbdAddress) -> bool {
    let NbdAddress::Unix(path) = address else { return false };
    let name = path.file_name().and_then(|n| n.to_str());
    name.is_some_and(|n| n.starts_with(PREFIX) && n.contains("nbd-") && n.ends_with(".sock"))
}

/// Whether one of these character devices (`unix:/path,server=on`, `disconnected:tcp:0.0.0.0:4444,..`)
/// listens there.
fn is_chardev(address: &NbdAddress, chardevs: &[&str]) -> bool {
    let name = match address {
        // By the file's name alone: the path may be another one where QEMU stands.
        NbdAddress::Unix(path) => match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => name.to_owned(),
            None => return false,
        },
        NbdAddress::Abstract(name) => String::from_utf8_lossy(name).into_owned(),
        NbdAddress::Tcp(address) => address.port().to_string(),
    };
    chardevs.iter().any(|chardev| {
        chardev.match_indices(&name).any(|(at, _)| {
            let before = chardev[..at].chars().next_back();
            let after = chardev[at + name.len()..].chars().next();
            matches!(before, Some(':' | '/' | '@' | '\0'))
                && matches!(after, None | Some(',' | ' '))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_character_devices_are_never_tried() {
        let chardevs = ["unix:/run/qmp.sock,server=on", "disconnected:tcp:0.0.0.0:1234,server=on"];
        let unix = |path: &str| NbdAddress::Unix(path.into());
        let tcp = |text: &str| NbdAddress::Tcp(text.parse().unwrap());
        assert!(is_chardev(&unix("/run/qmp.sock"), &chardevs));
        assert!(!is_chardev(&unix("/run/nbd.sock"), &chardevs));
        assert!(is_chardev(&tcp("127.0.0.1:1234"), &chardevs));
        assert!(!is_chardev(&tcp("127.0.0.1:123"), &chardevs));
    }

    #[test]
    fn only_sockets_with_our_name_are_ours() {
        assert!(is_ours(&NbdAddress::Unix("/run/x/longhaul-nbd-12.sock".into())));
        assert!(!is_ours(&NbdAddress::Unix("/run/longhaul-x/nbd.sock".into())));
        assert!(!is_ours(&NbdAddress::Abstract(b"longhaul-nbd-1.sock".to_vec())));
    }
}
