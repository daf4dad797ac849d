//! The peers that this host trusts: `peers.toml`.
//!
//! Invariant: what is in memory is what is on disk, and a fingerprint is trusted exactly while it is
//! in both. A name stands for one fingerprint and a fingerprint for one name.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use longhaul_transport::{Fingerprint, Trust};
use serde::{Deserialize, Serialize};

use super::durable;
use crate::config::{DEFAULT_PORT, Problem, valid_name};

/// More peers than this is not a list that somebody compared fingerprints for.
const PEERS_MAX: usize = 1000;
/// Longest address: a DNS name of 253 bytes, a colon and a port.
const ADDRESS_BYTES_MAX: usize = 259;

/// A host that this one trusts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name at this host.
    pub name: String,
    /// Host and port; the host may be a DNS name.
    pub address: String,
    /// What it proves to be.
    pub fingerprint: Fingerprint,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct PeersFile {
    #[serde(default, rename = "peer")]
    peers: Vec<Peer>,
}

/// Why the list of peers could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The file could not be read or written.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file makes no sense.
    #[error("{}: {problem}; correct the file, or delete it and pair anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The change makes no sense.
    #[error("{0}")]
    Refused(#[from] Problem),
}

/// All peers; shared between the control server and every handshake.
#[derive(Debug)]
pub struct PeerBook {
    path: PathBuf,
    own: Fingerprint,
    peers: RwLock<BTreeMap<String, Peer>>,
}

impl PeerBook {
    /// Reads `path`; a file that does not exist has no peers in it.
    ///
    /// # Errors
    /// The file cannot be read or makes no sense.
    pub fn load(path: &Path, own: Fingerprint) -> Result<Self, PeersError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(PeersError::Io { path: path.to_owned(), source }),
        };
        let damaged = |problem| PeersError::Damaged { path: path.to_owned(), problem };
        let file: PeersFile =
            toml::from_str(&text).map_err(|error| damaged(error.message().replace('\n', ", ")))?;
        let mut peers = BTreeMap::new();
        for peer in file.peers {
            let peer = checked(peer).and_then(|peer| may_join(&peers, own, &peer).map(|()| peer));
            let peer = peer.map_err(|problem| damaged(problem.what))?;
            if peers.insert(peer.name.clone(), peer).is_some() {
                return Err(damaged("two peers have one name".to_owned()));
            }
        }
        Ok(Self { path: path.to_owned(), own, peers: RwLock::new(peers) })
    }

    /// Trusts `peer` from now on; the address of one that is trusted already is replaced.
    ///
    /// # Errors
    /// The name or the fingerprint belongs to another peer, or the file cannot be written.
    pub fn add(&self, peer: Peer) -> Result<Peer, PeersError> {
        let peer = checked(peer)?;
        self.change(|peers| {
            may_join(peers, self.own, &peer)?;
            peers.insert(peer.name.clone(), peer.clone());
            Ok(peer)
        })
    }

    /// Trusts the peer no longer; running sessions with it end by themselves.
    ///
    /// # Errors
    /// There is no such peer, or the file cannot be written.
    pub fn remove(&self, name: &str) -> Result<Peer, PeersError> {
        self.change(|peers| peers.remove(name).ok_or_else(|| unknown(name)))
    }

    /// The peer of this name, or of this fingerprint: hosts have other names for each other.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<Peer, Problem> {
        let named = self.read().get(name).cloned();
        let proven = || self.by_fingerprint(&name.parse().ok()?);
        named.or_else(proven).ok_or_else(|| unknown(name))
    }

    /// The peer with this fingerprint.
    pub fn by_fingerprint(&self, fingerprint: &Fingerprint) -> Option<Peer> {
        self.read().values().find(|peer| peer.fingerprint == *fingerprint).cloned()
    }

    /// All peers by name.
    pub fn list(&self) -> Vec<Peer> {
        self.read().values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the file first and memory second, under one lock.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, Peer>) -> Result<T, Problem>,
    ) -> Result<T, PeersError> {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = peers.clone();
        let done = change(&mut changed)?;
        let file = PeersFile { peers: changed.values().cloned().collect() };
        toml::to_string(&file)
            .map_err(io::Error::other)
            .and_then(|text| durable::write(&self.path, text.as_bytes()))
            .map_err(|source| PeersError::Io { path: self.path.clone(), source })?;
        *peers = changed;
        Ok(done)
    }
}

impl Trust for PeerBook {
    fn is_trusted(&self, peer: &Fingerprint) -> bool {
        self.read().values().any(|known| known.fingerprint == *peer)
    }
}

fn unknown(name: &str) -> Problem {
    Problem {
        what: format!("no peer is called `{name}`"),
        remedy: "`longhaul pair --list` shows the peers".to_owned(),
    }
}

/// `host:port` with the port filled in: `lyon`, `lyon:4873`, `192.0.2.1`, `[2001:db8::1]:4873`.
///
/// # Errors
/// The text is no such thing.
pub(crate) fn full_address(text: &str) -> Result<String, Problem> {
    let wrong = || Problem {
        what: format!("`{}` is not an address", text.escape_debug()),
        remedy: format!("write host:port, e.g. 203.0.113.7:{DEFAULT_PORT} or lyon.example.org"),
    };
    let text = text.trim();
    if let Ok(ip) = text.trim_matches(['[', ']']).parse() {
        return Ok(std::net::SocketAddr::new(ip, DEFAULT_PORT).to_string());
    }
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return if address.port() == 0 { Err(wrong()) } else { Ok(text.to_owned()) };
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse::<u16>().map_err(|_| wrong())?),
        None => (text, DEFAULT_PORT),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let is_host = !host.is_empty() && host.chars().all(plain) && !host.starts_with(['-', '.']);
    if !is_host || port == 0 || text.len() > ADDRESS_BYTES_MAX {
        return Err(wrong());
    }
    Ok(format!("{host}:{port}"))
}

fn checked(peer: Peer) -> Result<Peer, Problem> {
    valid_name(&peer.name)?;
    Ok(Peer { address: full_address(&peer.address)?, ..peer })
}

fn may_join(peers: &BTreeMap<String, Peer>, own: Fingerprint, peer: &Peer) -> Result<(), Problem> {
    let refuse = |what: String, remedy: String| Err(Problem { what, remedy });
    if peer.fingerprint == own {
        let remedy = "run `longhaul pair` on the other host and type what it shows here";
        return refuse("this is the fingerprint of this host itself".to_owned(), remedy.to_owned());
    }
    if let Some(known) = peers.values().find(|known| known.fingerprint == peer.fingerprint)
        && known.name != peer.name
    {
        let what = format!("this host is paired already, as `{}`", known.name);
        return refuse(what, format!("use that name, or `longhaul pair --remove {}`", known.name));
    }
    if let Some(known) = peers.get(&peer.name)
        && known.fingerprint != peer.fingerprint
    {
        let what = format!("`{}` is paired already, with another fingerprint", peer.name);
        let remedy = format!(
            "if that host really has a new identity, `longhaul pair --remove {}` first",
            peer.name
        );
        return refuse(what, remedy);
    }
    if peers.len() >= PEERS_MAX && !peers.contains_key(&peer.name) {
        let what = format!("{PEERS_MAX} peers are paired already");
        return refuse(what, "remove one first".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Fingerprint = Fingerprint::from_bytes([9; 32]);

    fn peer(name: &str, key: u8) -> Peer {
        let fingerprint = Fingerprint::from_bytes([key; 32]);
        Peer { name: name.into(), address: "192.0.2.1".into(), fingerprint }
    }

    #[test]
    fn trust_is_live_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.toml");
        let book = PeerBook::load(&path, OWN).unwrap();
        let lyon = peer("lyon", 1);
        assert!(!book.is_trusted(&lyon.fingerprint));
        assert_eq!(book.add(lyon.clone()).unwrap().address, "192.0.2.1:4873");
        assert!(book.is_trusted(&lyon.fingerprint));

        let again = PeerBook::load(&path, OWN).unwrap();
        assert_eq!(again.list(), book.list());
        assert_eq!(again.by_fingerprint(&lyon.fingerprint).unwrap().name, "lyon");
        again.remove("lyon").unwrap();
        assert!(!again.is_trusted(&lyon.fingerprint));
        assert!(PeerBook::load(&path, OWN).unwrap().list().is_empty());
    }

    #[test]
    fn a_name_and_a_fingerprint_are_one() {
        let dir = tempfile::tempdir().unwrap();
        let book = PeerBook::load(&dir.path().join("peers.toml"), OWN).unwrap();
        book.add(peer("lyon", 1)).unwrap();
        let moved = Peer { address: "lyon.example.org:9".into(), ..peer("lyon", 1) };
        assert_eq!(book.add(moved).unwrap().address, "lyon.example.org:9");
        let refused = |peer| book.add(peer).unwrap_err().to_string();
        assert!(refused(peer("nice", 1)).contains("paired already, as `lyon`"));
        assert!(refused(peer("lyon", 2)).contains("`longhaul pair --remove lyon` first"));
        assert!(refused(peer("self", 9)).contains("this host itself"));
        assert!(refused(peer("../x", 3)).contains("is not a name"));
        assert!(book.remove("nice").unwrap_err().to_string().contains("--list"));
        assert_eq!(book.list().len(), 1);
    }

    #[test]
    fn addresses_get_a_port() {
        for (typed, full) in [
            ("lyon", "lyon:4873"),
            ("lyon.example.org:1", "lyon.example.org:1"),
            ("192.0.2.1", "192.0.2.1:4873"),
            ("2001:db8::1", "[2001:db8::1]:4873"),
            ("[2001:db8::1]", "[2001:db8::1]:4873"),
            ("[2001:db8::1]:7", "[2001:db8::1]:7"),
        ] {
            assert_eq!(full_address(typed).unwrap(), full);
        }
        for wrong in ["", ":4873", "lyon:", "lyon:0", "lyon:99999", "a b", "-x", "lyon/24"] {
            assert!(full_address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_damaged_file_is_refused_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers.toml");
        std::fs::write(&path, "[[peer]]\nname = \"lyon\"\n").unwrap();
        let error = PeerBook::load(&path, OWN).unwrap_err().to_string();
        assert!(
            error.contains("missing field `address`") && error.contains("pair anew"),
            "{error}"
        );
        assert!(std::fs::read_to_string(&path).unwrap().contains("lyon"));
    }
}
