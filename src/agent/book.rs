//! The book of this host's VMs: one file for each, `vms/NAME.toml`.
//!
//! Invariant: what the book says is durable before anybody acts on it. A VM is in `vms/` exactly
//! while it is this host's; one that moved away is in `departed/`, so that its images here are known
//! for what they are when it comes back.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::durable;
use super::setup::make_dir;
use crate::hypervisor::VmSpec;
use crate::hypervisor::spec::ImageLocation;

/// VMs of one host; more than this is not a folder of descriptions.
const VMS_MAX: usize = 4096;

/// A VM of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its QMP socket, if somebody else started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// What it is.
    pub vm: VmSpec,
}

/// Why the book cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// A file or folder cannot be read or written.
    #[error("while {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file is no description.
    #[error("{}: {problem}; correct it, or move it away and describe the VM anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There are too many.
    #[error("more than {VMS_MAX} VMs are in {}", dir.display())]
    TooMany {
        /// The folder.
        dir: PathBuf,
    },
}

/// The book.
#[derive(Debug)]
pub struct Book {
    vms_dir: PathBuf,
    departed_dir: PathBuf,
    pools: BTreeMap<String, PathBuf>,
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    here: BTreeMap<String, Entry>,
    departed: BTreeMap<String, Entry>,
}

impl Book {
    /// Opens the book below `state_dir`, making its folders. `pools` are the host's.
    ///
    /// # Errors
    /// A file cannot be read or is no description: a VM is not forgotten because its file was spoilt.
    pub fn open(state_dir: &Path, pools: BTreeMap<String, PathBuf>) -> Result<Self, BookError> {
        let (vms_dir, departed_dir) = (state_dir.join("vms"), state_dir.join("departed"));
        let pages = Pages { here: read_all(&vms_dir)?, departed: read_all(&departed_dir)? };
        Ok(Self { vms_dir, departed_dir, pools, pages: Mutex::new(pages) })
    }

    /// A VM of this host.
    pub fn get(&self, vm: &str) -> Option<Entry> {
        self.pages().here.get(vm).cloned()
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<Entry> {
        self.pages().here.values().cloned().collect()
    }

    /// The file that describes a VM.
    pub fn file(&self, vm: &str) -> PathBuf {
        path(&self.vms_dir, vm)
    }

    /// A VM is this host's from now on, or is described anew.
    ///
    /// # Errors
    /// The file cannot be written; then it is not this host's.
    pub fn add(&self, entry: Entry) -> Result<(), BookError> {
        let mut pages = self.pages();
        let name = entry.vm.name.clone();
        if pages.here.len() >= VMS_MAX && !pages.here.contains_key(&name) {
            return Err(BookError::TooMany { dir: self.vms_dir.clone() });
        }
        write(&path(&self.vms_dir, &name), &entry)?;
        pages.here.insert(name.clone(), entry);
        // Its images are its own again. If this fails, they are called left-overs once more than
        // needed, which only matters for a VM that is not here.
        if pages.departed.remove(&name).is_some() {
            remove(&path(&self.departed_dir, &name))?;
        }
        Ok(())
    }

    /// A VM is this host's no longer and nothing is kept of it; its images stay.
    ///
    /// # Errors
    /// Its file cannot be removed.
    pub fn forget(&self, vm: &str) -> Result<(), BookError> {
        let mut pages = self.pages();
        remove(&path(&self.vms_dir, vm))?;
        pages.here.remove(vm);
        Ok(())
    }

    /// A VM runs elsewhere now: its images here are left-overs of it. One that is not here departed
    /// earlier, which is fine: the hand-over may say so twice.
    ///
    /// # Errors
    /// The files cannot be written; the VM then is still this host's.
    pub fn depart(&self, vm: &str) -> Result<(), BookError> {
        let mut pages = self.pages();
        let Some(entry) = pages.here.get(vm).cloned() else { return Ok(()) };
        write(&path(&self.departed_dir, vm), &entry)?;
        remove(&path(&self.vms_dir, vm))?;
        pages.here.remove(vm);
        pages.departed.insert(vm.to_owned(), entry);
        Ok(())
    }

    /// A VM that departed is this host's again; one that is here already stays as it is.
    ///
    /// # Errors
    /// The files cannot be written, or no such VM has departed.
    pub fn reclaim(&self, vm: &str) -> Result<(), BookError> {
        if self.get(vm).is_some() {
            return Ok(());
        }
        let entry = self.pages().departed.get(vm).cloned();
        let entry = entry.ok_or_else(|| BookError::Io {
            doing: "looking for the description of a VM that had departed in",
            path: path(&self.departed_dir, vm),
            source: io::ErrorKind::NotFound.into(),
        })?;
        self.add(entry)
    }

    /// Whether `image` is one that the departed VM of this name left here, and no VM here uses.
    pub fn left_behind(&self, vm: &str, image: &Path) -> bool {
        self.departed_owner(image).is_some_and(|(owner, _)| owner == vm)
    }

    /// The departed VM that `image` is a left-over of, with its record, if no VM here uses it.
    pub fn departed_owner(&self, image: &Path) -> Option<(String, PathBuf)> {
        let pages = self.pages();
        if pages.here.values().any(|entry| self.uses(entry, image)) {
            return None;
        }
        let (vm, _) = pages.departed.iter().find(|(_, entry)| self.uses(entry, image))?;
        Some((vm.clone(), path(&self.departed_dir, vm)))
    }

    /// Where its disks lie, and nothing else of what a host makes of a description: a VM that could
    /// not run here today still owns its images.
    fn uses(&self, entry: &Entry, image: &Path) -> bool {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let image = real(image);
        entry.vm.disks.iter().any(|disk| match &disk.location {
            ImageLocation::Path { path } => real(path) == image,
            ImageLocation::Pool { pool, file } => {
                self.pools.get(pool).is_some_and(|dir| real(&real(dir).join(file)) == image)
            }
        })
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names of VMs are checked before they come here: letters, digits, `-`, `_` and `.`.
fn path(dir: &Path, vm: &str) -> PathBuf {
    dir.join(format!("{vm}.toml"))
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BookError + use<> {
    let path = path.to_owned();
    move |source| BookError::Io { doing, path, source }
}

fn write(path: &Path, entry: &Entry) -> Result<(), BookError> {
    toml::to_string(entry)
        .map_err(io::Error::other)
        .and_then(|text| durable::write(path, text.as_bytes()))
        .map_err(io_error("writing", path))
}

fn remove(path: &Path) -> Result<(), BookError> {
    durable::remove(path).map_err(io_error("removing", path))
}

fn read_all(dir: &Path) -> Result<BTreeMap<String, Entry>, BookError> {
    make_dir(dir).map_err(io_error("making", dir))?;
    let mut entries = BTreeMap::new();
    for file in std::fs::read_dir(dir).map_err(io_error("reading", dir))? {
        let path = file.map_err(io_error("reading", dir))?.path();
        let is_entry = path.extension().is_some_and(|extension| extension == "toml");
        let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).filter(|_| is_entry)
        else {
            continue;
        };
        if entries.len() >= VMS_MAX {
            return Err(BookError::TooMany { dir: dir.to_owned() });
        }
        let text = std::fs::read_to_string(&path).map_err(io_error("reading", &path))?;
        let damaged = |problem: String| BookError::Damaged { path: path.clone(), problem };
        let entry: Entry =
            toml::from_str(&text).map_err(|error| damaged(error.message().replace('\n', ", ")))?;
        if entry.vm.name != name {
            return Err(damaged(format!("it describes a VM called {}", entry.vm.name)));
        }
        entries.insert(name.to_owned(), entry);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, file: &str) -> Entry {
        let vm = toml::from_str(&format!(
            "name = \"{name}\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 128\n\
             [cpu]\nmodel = \"qemu64\"\n\
             [[disks]]\nid = \"d\"\nlocation = {{ pool = \"default\", file = \"{file}\" }}\n\
             format = \"raw\"\nbus = \"virtio-blk\"\n"
        ));
        Entry { qmp: None, vm: vm.unwrap() }
    }

    fn pools(dir: &Path) -> BTreeMap<String, PathBuf> {
        [("default".to_owned(), dir.to_owned())].into()
    }

    #[test]
    fn the_book_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let book = Book::open(dir.path(), pools(dir.path())).unwrap();
        let adopted = Entry { qmp: Some("/run/web.qmp".into()), ..entry("web", "web.raw") };
        book.add(entry("db1", "db1.raw")).unwrap();
        book.add(adopted.clone()).unwrap();
        let again = Book::open(dir.path(), pools(dir.path())).unwrap();
        assert_eq!(again.all(), book.all());
        assert_eq!(again.get("web"), Some(adopted));
        again.forget("web").unwrap();
        assert!(Book::open(dir.path(), pools(dir.path())).unwrap().get("web").is_none());
    }

    #[test]
    fn a_departed_vm_leaves_images_that_nobody_else_uses() {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().to_owned();
        let book = Book::open(dir.path(), pools(dir.path())).unwrap();
        book.add(entry("db1", "db1.raw")).unwrap();
        let image = pool.join("db1.raw");
        assert!(!book.left_behind("db1", &image));
        book.depart("db1").unwrap();
        book.depart("db1").unwrap();
        assert!(book.get("db1").is_none());
        let book = Book::open(dir.path(), pools(dir.path())).unwrap();
        assert!(book.left_behind("db1", &image));
        assert!(!book.left_behind("db1", &pool.join("other.raw")));
        assert!(!book.left_behind("db2", &image));
        // Somebody has built a new VM on it since.
        book.add(entry("db2", "db1.raw")).unwrap();
        assert!(!book.left_behind("db1", &image));
        book.forget("db2").unwrap();
        book.add(entry("db1", "db1.raw")).unwrap();
        assert!(!book.left_behind("db1", &image));
        assert!(!dir.path().join("departed/db1.toml").exists());
    }

    #[test]
    fn a_spoilt_file_stops_the_agent_rather_than_losing_a_vm() {
        let dir = tempfile::tempdir().unwrap();
        Book::open(dir.path(), pools(dir.path())).unwrap().add(entry("db1", "d")).unwrap();
        let file = dir.path().join("vms/db1.toml");
        std::fs::rename(&file, dir.path().join("vms/db2.toml")).unwrap();
        let error = Book::open(dir.path(), pools(dir.path())).unwrap_err().to_string();
        assert!(
            error.contains("vms/db2.toml: it describes a VM called db1; correct it"),
            "{error}"
        );
        std::fs::write(dir.path().join("vms/db2.toml"), "[vm]\n").unwrap();
        let error = Book::open(dir.path(), pools(dir.path())).unwrap_err().to_string();
        assert!(error.contains("missing field"), "{error}");
    }
}
