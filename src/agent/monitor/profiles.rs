//! What this host and each of its VMs did in the last two weeks, kept in the state folder.
//!
//! Invariant: a slot's figures are the mean of the samples taken in it, and are written once it is over. A
//! folder or a file that cannot be written costs what would be in it and a warning, and stops nobody.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use longhaul_scheduler::season::{Outlook, Season};

use super::profile::{Pair, Profile, SLOT_S};

/// The folder, in the state folder.
pub(crate) const FOLDER: &str = "profiles";
/// The file of the host itself; of a VM it is its name with this before it.
const HOST: &str = "host";
const OF_VM: &str = "vm-";
/// Files of VMs that were not here for so long are removed.
const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// All profiles.
#[derive(Debug)]
pub(super) struct Profiles {
    folder: PathBuf,
    series: BTreeMap<String, Series>,
    /// What others than us send from this host, MiB a second.
    uplink: Season,
}

#[derive(Debug)]
struct Series {
    profile: Profile,
    /// The slot that is being seen, the sum of its samples and their number.
    slot: i64,
    sum: [f64; 2],
    samples: u32,
}

impl Series {
    /// A sample; what the slot before was, if this one begins another.
    fn see(&mut self, slot: i64, pair: [f64; 2]) -> Option<(i64, Pair)> {
        let over = (slot != self.slot && self.samples > 0).then(|| {
            let mean = self.sum.map(|sum| (sum / f64::from(self.samples)) as f32);
            (self.slot, mean)
        });
        if slot != self.slot {
            (self.slot, self.sum, self.samples) = (slot, [0.0; 2], 0);
        }
        self.sum = [self.sum[0] + pair[0], self.sum[1] + pair[1]];
        self.samples += 1;
        over
    }
}

impl Profiles {
    /// What `folder` holds. Forgotten files are removed.
    pub(super) fn open(folder: PathBuf) -> Self {
        if let Err(error) = std::fs::create_dir_all(&folder) {
            tracing::warn!(folder = %folder.display(), %error, "no profiles are kept");
        }
        forget(&folder);
        let mut profiles =
            Self { folder, series: BTreeMap::new(), uplink: Season::new(SLOT_S as u32) };
        if let Some(host) = profiles.series(HOST.to_owned()) {
            let seen: Vec<(i64, Pair)> = host
                .profile
                .newest()
                .map(|at| host.profile.before(at + 1).collect())
                .unwrap_or_default();
            for (slot, [others, _]) in seen {
                profiles.uplink.observe(slot * SLOT_S, f64::from(others));
            }
        }
        profiles
    }

    /// Samples of the host (MiB a second sent by others, cores used) and of VMs (cores used, MiB a second
    /// written), taken at `now_s`.
    pub(super) fn see(
        &mut self,
        now_s: i64,
        host: Option<[f64; 2]>,
        vms: impl Iterator<Item = (String, [f64; 2])>,
    ) {
        let slot = now_s.div_euclid(SLOT_S);
        if let Some(pair) = host
            && let Some((slot, [others, _])) = self.note(HOST.to_owned(), slot, pair)
        {
            self.uplink.observe(slot * SLOT_S, f64::from(others));
        }
        for (vm, pair) in vms {
            self.note(format!("{OF_VM}{vm}"), slot, pair);
        }
    }

    fn note(&mut self, name: String, slot: i64, pair: [f64; 2]) -> Option<(i64, Pair)> {
        let series = self.series(name)?;
        let (over, mean) = series.see(slot, pair)?;
        if let Err(error) = series.profile.put(over, mean) {
            tracing::warn!(%error, "a profile cannot be written");
        }
        Some((over, mean))
    }

    fn series(&mut self, name: String) -> Option<&mut Series> {
        use std::collections::btree_map::Entry;
        match self.series.entry(name) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(new) => {
                let profile = Profile::open(&self.folder.join(new.key())).inspect_err(|error| {
                    tracing::warn!(profile = new.key(), %error, "a profile cannot be opened");
                });
                let series = Series { profile: profile.ok()?, slot: 0, sum: [0.0; 2], samples: 0 };
                Some(new.insert(series))
            }
        }
    }

    /// What a VM did in each slot before that of `now_s`, the newest last; nothing if it was never seen.
    pub(super) fn vm(&mut self, vm: &str, now_s: i64) -> Option<Vec<Pair>> {
        let name = format!("{OF_VM}{vm}");
        // It may have been seen before this agent was started, and not since.
        let is_known = self.series.contains_key(&name) || self.folder.join(&name).is_file();
        let series = is_known.then(|| self.series(name)).flatten()?;
        let slot = now_s.div_euclid(SLOT_S);
        Some(series.profile.before(slot).map(|(_, pair)| pair).collect())
    }

    /// What others are expected to send from this host in so many slots from that of `from_s` on; nothing
    /// while that is not known.
    pub(super) fn uplink(&self, from_s: i64, slots: usize) -> Vec<Outlook> {
        self.uplink.outlooks(from_s, slots)
    }
}

fn forget(folder: &Path) {
    let Ok(files) = std::fs::read_dir(folder) else { return };
    for file in files.flatten() {
        let written = file.metadata().and_then(|of| of.modified());
        let age = written.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        let is_ours = file.file_name().to_string_lossy().starts_with(OF_VM);
        if is_ours && age.is_some_and(|age| age > FORGOTTEN) {
            // One that stays costs a few KiB.
            let _ = std::fs::remove_file(file.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_S: i64 = 1_700_000_100;

    fn see(profiles: &mut Profiles, now_s: i64, others: f64, cpu: f64) {
        profiles.see(now_s, Some([others, 1.0]), [("db1".to_owned(), [cpu, 0.5])].into_iter());
    }

    #[test]
    fn a_slot_is_the_mean_of_its_samples_and_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut profiles = Profiles::open(dir.path().join("p"));
        for (after_s, cpu) in [(0, 1.0), (15, 3.0), (300, 9.0), (600, 5.0)] {
            see(&mut profiles, NOW_S + after_s, 10.0, cpu);
        }
        assert!(profiles.vm("db2", NOW_S).is_none());
        drop(profiles);
        let mut profiles = Profiles::open(dir.path().join("p"));
        let seen = profiles.vm("db1", NOW_S + 600).unwrap();
        assert_eq!(seen[seen.len() - 2..], [[2.0, 0.5], [9.0, 0.5]]);
        assert!(seen[seen.len() - 3][0].is_nan());
        let outlooks = profiles.uplink(NOW_S + 3600, 2);
        assert!(outlooks.len() == 2 && (outlooks[1].mean - 10.0).abs() < 1e-6, "{outlooks:?}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_stops_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let mut profiles = Profiles::open(file);
        see(&mut profiles, NOW_S, 1.0, 1.0);
        assert!(profiles.vm("db1", NOW_S).is_none());
        assert!(profiles.uplink(NOW_S + 3600, 1).is_empty());
    }
}
