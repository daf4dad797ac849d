//! The identity of an agent: one private key on its own disk, made at first use.
//!
//! Invariant: the key file alone is the identity. The certificate that QUIC needs is a function of
//! the key and is made anew at every start, so no crash can leave the two apart.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DnType, KeyPair, PublicKeyData};
use thiserror::Error;

use crate::fingerprint::Fingerprint;

/// Name of the key file in the agent's state folder.
pub const KEY_FILE: &str = "identity.key";
/// Largest key file that is read; a real one has some 120 bytes.
const MAX_KEY_FILE: u64 = 16 * 1024;
/// Tries to win or lose the race against another process that makes the same identity.
const MAX_ATTEMPTS: usize = 3;
/// The name in every certificate. Agents are told apart by key, never by name.
pub(crate) const CERTIFICATE_NAME: &str = "longhaul";

/// Why an identity could not be loaded or made.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file operation failed.
    #[error("while {doing} {}", path.display())]
    Io {
        /// The operation.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else than the owner may read or write the key.
    #[error(
        "the private key {} is open to other users (mode {mode:04o}): if nobody can have copied it, \
         run `chmod 600` on it, else delete it and pair this agent again",
        path.display()
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is there, and is no private key.
    #[error(
        "{} holds no private key that can be read: restore it from a copy, or delete it and pair \
         this agent again",
        path.display()
    )]
    Damaged {
        /// The key file.
        path: PathBuf,
    },
    /// The cryptographic library refused.
    #[error("while {doing} for this agent")]
    Key {
        /// The operation.
        doing: &'static str,
        /// What the library said.
        #[source]
        source: rcgen::Error,
    },
}

/// One agent's key, its self-signed certificate and its fingerprint.
#[derive(Clone)]
pub struct Identity {
    certificate: Vec<u8>,
    key: Vec<u8>,
    fingerprint: Fingerprint,
}

impl fmt::Debug for Identity {
    /// Never prints the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

impl Identity {
    /// Loads the identity of the agent whose state folder is `dir`, or makes one there.
    ///
    /// The folder is made with mode 0700 if it is missing. A new key is written to a temporary file
    /// with mode 0600, synced, and linked under its name without replacing another, so a crash
    /// leaves either no identity or a whole one, and two agents that start at once get the same.
    ///
    /// # Errors
    /// Refuses a key file that others than its owner may read, or that is damaged; nothing is ever
    /// overwritten.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io_error("making the folder", dir))?;
        let path = dir.join(KEY_FILE);
        for _ in 0..MAX_ATTEMPTS {
            if let Some(pem) = read_key(&path)? {
                let key = KeyPair::from_pem(&pem)
                    .map_err(|_| IdentityError::Damaged { path: path.clone() })?;
                return Self::from_key(&key);
            }
            let key = KeyPair::generate_for(&rcgen::PKCS_ED25519)
                .map_err(|source| IdentityError::Key { doing: "making a key", source })?;
            if store_key(dir, &path, &key.serialize_pem())? {
                return Self::from_key(&key);
            }
        }
        Err(IdentityError::Damaged { path })
    }

    /// The fingerprint by which peers know this agent.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The self-signed certificate, DER.
    pub(crate) fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// The private key, PKCS #8 DER.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    fn from_key(key: &KeyPair) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Key { doing: "making the certificate", source };
        // rcgen's default validity (1975 to 4096) is kept: trust ends when the operator unpairs,
        // not at a date that nobody watches.
        let mut params =
            CertificateParams::new(vec![CERTIFICATE_NAME.to_owned()]).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, CERTIFICATE_NAME);
        let certificate = params.self_signed(key).map_err(failed)?;
        Ok(Self {
            certificate: certificate.der().to_vec(),
            key: key.serialize_der(),
            fingerprint: Fingerprint::of_public_key(&key.subject_public_key_info()),
        })
    }
}

fn io_error<'a>(
    doing: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> IdentityError + 'a {
    move |source| IdentityError::Io { doing, path: path.to_owned(), source }
}

/// The text of the key file, or `None` if there is none.
fn read_key(path: &Path) -> Result<Option<String>, IdentityError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("opening the private key", path)(error)),
    };
    // Asked of the open file, so that it cannot be swapped between the check and the reading.
    let metadata = file.metadata().map_err(io_error("examining the private key", path))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    let damaged = || IdentityError::Damaged { path: path.to_owned() };
    if !metadata.is_file() || metadata.len() > MAX_KEY_FILE {
        return Err(damaged());
    }
    let mut text = String::new();
    match file.take(MAX_KEY_FILE).read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(damaged()),
        Err(error) => Err(io_error("reading the private key", path)(error)),
    }
}

/// Stores a new key durably. False if another process was first.
fn store_key(dir: &Path, path: &Path, pem: &str) -> Result<bool, IdentityError> {
    let temporary = dir.join(format!(".{KEY_FILE}.{:016x}", rand::random::<u64>()));
    let written = write_new(&temporary, pem)
        .map_err(io_error("writing the private key to", &temporary))
        // A hard link, and not a rename, because it fails where a key is already there.
        .and_then(|()| match fs::hard_link(&temporary, path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(io_error("storing the private key as", path)(error)),
        });
    if let Err(error) = fs::remove_file(&temporary) {
        tracing::warn!(path = %temporary.display(), %error, "a temporary key file is left behind");
    }
    let won = written?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("syncing the folder", dir))?;
    Ok(won)
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_private_and_stays() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("state");
        let first = Identity::load_or_create(&dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(KEY_FILE)), 0o600);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "no temporary file is left");

        let second = Identity::load_or_create(&dir).unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        let other = Identity::load_or_create(&home.path().join("other")).unwrap();
        assert_ne!(first.fingerprint(), other.fingerprint());
        assert!(!format!("{first:?}").contains("key"));
    }

    #[test]
    fn an_exposed_key_is_refused() {
        let home = tempfile::tempdir().unwrap();
        Identity::load_or_create(home.path()).unwrap();
        let path = home.path().join(KEY_FILE);
        for mode in [0o640, 0o604, 0o622] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = Identity::load_or_create(home.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Exposed { mode: m, .. } if m == mode));
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        Identity::load_or_create(home.path()).unwrap();
    }

    #[test]
    fn a_damaged_key_is_refused_and_kept() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(KEY_FILE);
        for damage in [&b""[..], b"not a key", b"\xff\xfe", &[b'x'; 20_000]] {
            fs::write(&path, damage).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let error = Identity::load_or_create(home.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Damaged { .. }), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damage);
        }
    }

    #[test]
    fn agents_that_start_at_once_share_one_identity() {
        let home = tempfile::tempdir().unwrap();
        let made: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Identity::load_or_create(home.path()).unwrap()))
                .collect();
            starts.into_iter().map(|start| start.join().unwrap().fingerprint()).collect()
        });
        assert!(made.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
