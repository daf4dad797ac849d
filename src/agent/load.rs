//! A host's report to whoever plans for it.
//!
//! Invariant: the report says what is the case, and decides nothing; a VM of which nothing is known yet is
//! in it without a figure.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::answer::{Desk, RECENT_MAX};
use crate::control::{HostLoad, LinkLoad, VmLoad};
use crate::hypervisor::VmSpec;
use crate::hypervisor::spec::host::{HostPolicy, resolve_own};

impl Desk {
    /// What this host and its VMs have asked for, in the mean over the last `over`.
    pub(super) fn load(&self, over: Duration) -> HostLoad {
        let means = self.monitor.means(over);
        let seeded = self.mover.seeded();
        let fingerprint = |peer: &str| self.peers.get(peer).ok().map(|p| p.fingerprint.to_string());
        let vms = self.registry.book().all().into_iter().map(|entry| {
            let spec = entry.vm;
            let asked = means.vms.get(&spec.name).copied();
            VmLoad {
                runs: means.running.contains(&spec.name),
                cpu: asked.map(|vm| vm.cpu),
                vcpus: spec.vcpus,
                memory_mib: spec.memory_mib,
                disk_mib: disk_mib(&spec, self.registry.policy()),
                written_bytes_s: asked.map_or(0.0, |vm| vm.written_bytes_s),
                seeded_at: seeded.get(&spec.name).and_then(|peer| fingerprint(peer)),
                name: spec.name,
            }
        });
        let links = self.links.all().into_iter().filter_map(|link| {
            let path = link.path?;
            Some(LinkLoad {
                peer: fingerprint(&link.peer)?,
                rtt_ms: path.min_rtt.as_secs_f64() * 1000.0,
                bytes_s: path.bandwidth as f64,
            })
        });
        let cap = self.caps.limits(jiff::Timestamp::now()).agent.now;
        HostLoad {
            name: self.config.name.clone(),
            fingerprint: self.own.to_string(),
            age_ms: means.age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            cores: means.cores,
            cpu: means.cpu,
            memory_mib: means.memory_mib,
            pressure: means.pressure,
            network_bytes_s: means.network_bytes_s,
            cap_bytes_s: cap.map(|rate| rate.bits_per_second() as f64 / 8.0),
            vms: vms.collect(),
            links: links.collect(),
            jobs: self.jobs.summaries(),
            recent: self.jobs.recent(RECENT_MAX),
        }
    }
}

/// What the images of a VM take on this host's disks, in MiB.
pub(super) fn disk_mib(spec: &VmSpec, policy: &HostPolicy) -> u64 {
    /// Of `st_blocks` (stat(2)).
    const BLOCK_BYTES: u64 = 512;
    let Ok(resolved) = resolve_own(spec, policy) else { return 0 };
    let sizes = resolved.disks.iter().filter_map(|disk| std::fs::metadata(&disk.path).ok());
    sizes.map(|of| of.blocks() * BLOCK_BYTES).sum::<u64>() >> 20
}
