//! Slow cores: a limit to what each thread that carries connections may take of a core, so that one core
//! is what limits a session on a link that the lab can carry.
//!
//! Invariant: only this program's own ends are slowed, and what was made for it is gone afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Where control groups (version 1) of the CPU are.
const GROUPS: &str = "/sys/fs/cgroup/cpu";
/// Name of the threads, as the transport gives it.
const THREAD: &str = "longhaul-link";
/// What a thread may take at a time, in microseconds: the shortest that the kernel allows.
const PART_US: u32 = 1_000;
/// How often it is looked for new threads.
const LOOK: Duration = Duration::from_millis(20);

/// Slows threads down for as long as it lives.
#[derive(Debug)]
pub struct Slow {
    stop: Arc<AtomicBool>,
    watching: Option<JoinHandle<()>>,
    root: PathBuf,
}

impl Slow {
    /// Lets each of the threads have so many percent of a core.
    ///
    /// # Errors
    ///
    /// Control groups of version 1 are not mounted, or may not be made.
    pub fn down(percent: u32) -> Result<Self> {
        let groups = Path::new(GROUPS);
        ensure!(
            groups.join("cpu.cfs_quota_us").exists(),
            "cores are slowed down with control groups of version 1, which are not mounted at {GROUPS}"
        );
        let root = groups.join(format!("longhaul-lab-{}", std::process::id()));
        fs::create_dir(&root).with_context(|| format!("cannot make {}", root.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let watching = thread::spawn({
            let (stop, root) = (stop.clone(), root.clone());
            move || {
                let mut slowed = BTreeSet::new();
                while !stop.load(Ordering::Relaxed) {
                    for task in tasks() {
                        if !slowed.contains(&task) && slow(&root, &task, percent).is_ok() {
                            slowed.insert(task);
                        }
                    }
                    thread::sleep(LOOK);
                }
            }
        });
        Ok(Self { stop, watching: Some(watching), root })
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(watching) = self.watching.take() {
            // It has nothing that could fail.
            let _ = watching.join();
        }
        let groups = fs::read_dir(&self.root).into_iter().flatten().flatten();
        for group in groups.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            // Its thread has ended; if not, it stays slow and its group is there.
            let _ = fs::remove_dir(group.path());
        }
        let _ = fs::remove_dir(&self.root);
    }
}

/// Puts a thread into a group of its own.
fn slow(root: &Path, task: &str, percent: u32) -> std::io::Result<()> {
    let group = root.join(task);
    fs::create_dir_all(&group)?;
    fs::write(group.join("cpu.cfs_period_us"), (PART_US * 100 / percent).to_string())?;
    fs::write(group.join("cpu.cfs_quota_us"), PART_US.to_string())?;
    fs::write(group.join("tasks"), task)
}

/// The threads of this program's processes that carry connections.
fn tasks() -> Vec<String> {
    let own = fs::read_link("/proc/self/exe").ok();
    let entries = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    entries(PathBuf::from("/proc"))
        .filter(|process| own.is_some() && fs::read_link(process.path().join("exe")).ok() == own)
        .flat_map(|process| entries(process.path().join("task")))
        .filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == THREAD)
        })
        .filter_map(|task| task.file_name().into_string().ok())
        .collect()
}
