//! The hosts and VMs of the consolidation papers: sizes, power, and how a host shares its CPU.
//!
//! Invariant: with the same VMs in the same order a host gives the same shares to the last bit, as
//! the figures compare what was given with what was asked. Sizes, power and rules are those of
//! CloudSim 3.0.3's PlanetLab example (Beloglazov, Buyya, CCPE 24(13), 2012).

/// Hosts of the set-up; they alternate between the two types.
pub(super) const HOSTS: usize = 800;
/// Memory of each host in MiB; it binds only at the first placement.
pub(super) const HOST_MEMORY_MIB: u64 = 4096;
/// CPU cores of each host.
const CORES: f64 = 2.0;
/// MiB a second of a migration: half of a host's 1 Gbit/s.
pub(super) const MIGRATION_MIB_S: f64 = 1e6 / 16_000.0;
/// What a VM loses while it leaves a host.
const KEPT_WHILE_LEAVING: f64 = 0.9;
/// What a VM costs the host that it is on its way to.
const COST_WHILE_ARRIVING: f64 = 0.1;

/// Watts at 0, 10, .. 100 % use: HP ProLiant ML110 G4 and G5 (SPECpower_ssj2008).
const POWER_W: [[f64; 11]; 2] = [
    [86.0, 89.4, 92.6, 96.0, 99.5, 102.0, 106.0, 108.0, 112.0, 114.0, 117.0],
    [93.7, 97.0, 101.0, 105.0, 110.0, 116.0, 121.0, 125.0, 129.0, 133.0, 135.0],
];
/// MIPS of one core of each.
const CORE_MIPS: [f64; 2] = [1860.0, 2660.0];
/// MIPS and MiB of the four sizes of VMs, each one core.
const VM_SIZES: [(f64, u64); 4] = [(2500.0, 870), (2000.0, 1740), (1000.0, 1740), (500.0, 613)];

/// One of the two types of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostType(usize);

impl HostType {
    /// The type of the host of that number.
    pub(super) fn of(host: usize) -> Self {
        Self(host % CORE_MIPS.len())
    }

    /// MIPS of one core, the most that a VM of one core gets.
    pub(super) fn core_mips(self) -> f64 {
        CORE_MIPS[self.0]
    }

    /// MIPS of all cores.
    pub(super) fn mips(self) -> f64 {
        CORES * self.core_mips()
    }

    /// Watts at `share` of its MIPS in use; linear between the measured tenths.
    pub(super) fn power_w(self, share: f64) -> f64 {
        let (share, steps) = (share.clamp(0.0, 1.0), &POWER_W[self.0]);
        let low = (share * 10.0).floor();
        let (from, to) = (steps[low as usize], steps[(share * 10.0).ceil() as usize]);
        from + (to - from) / 10.0 * (share - low / 10.0) * 100.0
    }
}

/// MIPS and MiB of the VM of that number out of `count`: four blocks of equal length.
pub(super) fn vm_size(number: usize, count: usize) -> (f64, u64) {
    VM_SIZES[number / count.div_ceil(VM_SIZES.len()).max(1)]
}

/// How a VM stands to a host that shares its CPU with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stay {
    /// It runs there.
    Settled,
    /// It runs there and is on its way to another.
    Leaving,
    /// It runs elsewhere and is on its way here.
    Arriving,
}

/// What a host gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Shares {
    /// MIPS of each VM.
    pub(super) given: Vec<f64>,
    /// MIPS that are left.
    pub(super) free: f64,
}

/// Shares a host among VMs that ask for so many MIPS: all get what they ask for, or, when that is
/// more than there is, the same part of it, in whole MIPS.
pub(super) fn share(host: HostType, asked: &[(f64, Stay)]) -> Shares {
    let core = host.core_mips();
    let cost = |&(mips, stay): &(f64, Stay)| match stay {
        Stay::Arriving => mips.min(core) * COST_WHILE_ARRIVING,
        Stay::Settled | Stay::Leaving => mips.min(core),
    };
    let mut free = host.mips();
    for one in asked {
        if free < cost(one) {
            let part = host.mips() / asked.iter().map(cost).sum::<f64>();
            let given = asked.iter().map(|&(mips, stay)| {
                let mips = mips.min(core);
                match stay {
                    Stay::Settled => mips * part,
                    Stay::Leaving => mips * part * KEPT_WHILE_LEAVING,
                    Stay::Arriving => mips * COST_WHILE_ARRIVING * part,
                }
                .floor()
            });
            return Shares { given: given.collect(), free: 0.0 };
        }
        free -= cost(one);
    }
    let given = asked.iter().map(|&(mips, stay)| match stay {
        Stay::Settled => mips.min(core),
        Stay::Leaving => mips.min(core) * KEPT_WHILE_LEAVING,
        Stay::Arriving => mips.min(core) * COST_WHILE_ARRIVING,
    });
    Shares { given: given.collect(), free }
}

/// What a VM that leaves would have cost the host without its loss.
pub(super) fn before_loss(given: f64) -> f64 {
    given / KEPT_WHILE_LEAVING
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_is_linear_between_the_measured_tenths() {
        let host = HostType::of(0);
        assert_eq!(host.power_w(0.0), 86.0);
        assert!((host.power_w(0.05) - 87.7).abs() < 1e-9);
        assert_eq!(host.power_w(1.0), 117.0);
        assert_eq!(host.power_w(7.0), 117.0);
    }

    #[test]
    fn a_host_gives_what_is_asked_until_it_cannot() {
        let host = HostType::of(0);
        let enough = share(host, &[(1000.0, Stay::Settled), (1000.0, Stay::Arriving)]);
        assert_eq!(enough, Shares { given: vec![1000.0, 100.0], free: 2620.0 });
        let short = share(host, &[(2500.0, Stay::Settled); 3]);
        assert_eq!(short, Shares { given: vec![1240.0; 3], free: 0.0 });
    }

    #[test]
    fn vms_come_in_four_blocks() {
        let sizes: Vec<f64> = (0..10).map(|number| vm_size(number, 10).0).collect();
        assert_eq!(
            &sizes,
            &[2500.0, 2500.0, 2500.0, 2000.0, 2000.0, 2000.0, 1000.0, 1000.0, 1000.0, 500.0]
        );
    }
}
