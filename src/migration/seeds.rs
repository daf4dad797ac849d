//! The seed book: which disks of ours lie complete at which peer, and since when writes are tracked.
//!
//! Invariant: an entry is a hint. Before it is used the hypervisor must still track writes without
//! a gap and the target must hold just this generation; a lost or stale entry costs a comparison by
//! hashes, nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// A seed that lies at a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// The peer's name at this host.
    pub peer: String,
    /// Names the state of the target's images.
    pub generation: u64,
    /// When it was kept, in RFC 3339.
    pub at: String,
}

/// The book; clones share it.
#[derive(Debug, Clone)]
pub struct SeedBook {
    path: PathBuf,
    seeds: Arc<Mutex<BTreeMap<String, Seed>>>,
}

impl SeedBook {
    /// Opens the book at `path`; a file that cannot be read is an empty book.
    pub fn open(path: &Path) -> Self {
        let seeds = fs::read(path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self { path: path.to_path_buf(), seeds: Arc::new(Mutex::new(seeds)) }
    }

    /// The seed of a VM.
    pub fn get(&self, vm: &str) -> Option<Seed> {
        self.lock().get(vm).cloned()
    }

    /// All seeds, by VM.
    pub fn all(&self) -> BTreeMap<String, Seed> {
        self.lock().clone()
    }

    /// Notes a seed.
    pub fn insert(&self, vm: &str, seed: Seed) -> io::Result<()> {
        self.lock().insert(vm.to_owned(), seed);
        self.save()
    }

    /// Forgets the seed of a VM.
    pub fn remove(&self, vm: &str) -> io::Result<()> {
        if self.lock().remove(vm).is_none() {
            return Ok(());
        }
        self.save()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Seed>> {
        self.seeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(&*self.lock()).map_err(io::Error::other)?;
        let part = self.path.with_extension("part");
        fs::write(&part, json)?;
        fs::rename(part, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_book_survives_its_owner_and_damage_empties_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seeds.json");
        let seed = Seed { peer: "dc2".into(), generation: 7, at: "now".into() };
        SeedBook::open(&path).insert("web", seed.clone()).unwrap();
        assert_eq!(SeedBook::open(&path).get("web"), Some(seed));
        fs::write(&path, b"{").unwrap();
        assert_eq!(SeedBook::open(&path).get("web"), None);
    }
}
