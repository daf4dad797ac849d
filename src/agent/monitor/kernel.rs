//! What Linux tells of CPU, memory and network (proc(5)).
//!
//! Invariant: whatever is missing or malformed is `None`, never a zero that somebody could believe.

use std::fs;
use std::path::Path;

const NS_PER_S: f64 = 1e9;

/// Running totals of this host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct HostCounters {
    /// Seconds in which its CPUs were used or stolen, all together.
    pub(super) busy_s: f64,
    /// Bytes received and sent by all interfaces but loopback.
    pub(super) network_bytes: (u64, u64),
    /// MiB that could be had without swapping.
    pub(super) available_mib: u64,
    /// Share of the last ten seconds in which something waited for a CPU.
    pub(super) pressure: Option<f64>,
}

/// Running totals of one process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ProcessCounters {
    /// Seconds that it ran, ended threads included.
    pub(super) ran_s: f64,
    /// Seconds for which its living threads waited for a CPU.
    pub(super) waited_s: f64,
    /// MiB that it has of this host's memory.
    pub(super) resident_mib: u64,
}

/// Processors that are there.
pub(super) fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64)
}

/// What this host has counted so far.
pub(super) fn host() -> Option<HostCounters> {
    let read = |path| fs::read_to_string(path).ok();
    Some(HostCounters {
        busy_s: busy_ticks(&read("/proc/stat")?)? as f64 / ticks_per_s(),
        network_bytes: network(&read("/proc/net/dev")?),
        available_mib: available_kib(&read("/proc/meminfo")?)? >> 10,
        pressure: read("/proc/pressure/cpu").and_then(|text| pressure(&text)),
    })
}

/// What one process has counted so far; `None` once it is gone.
pub(super) fn process(pid: i32) -> Option<ProcessCounters> {
    let folder = Path::new("/proc").join(pid.to_string());
    let (ticks, pages) = ran_and_resident(&fs::read(folder.join("stat")).ok()?)?;
    let mut waited_ns = 0;
    for thread in fs::read_dir(folder.join("task")).ok()?.flatten() {
        // A kernel without these figures, or a thread that has ended meanwhile, has not waited.
        let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        waited_ns += waited(&text).unwrap_or(0);
    }
    Some(ProcessCounters {
        ran_s: ticks as f64 / ticks_per_s(),
        waited_s: waited_ns as f64 / NS_PER_S,
        resident_mib: (pages * rustix::param::page_size() as u64) >> 20,
    })
}

fn ticks_per_s() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// `cpu user nice system idle iowait irq softirq steal ..`: all but idle and iowait. What runs guests is
/// in user already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6, 7];
    busy.iter().map(|at| ticks.get(*at).copied()).sum()
}

/// Sums of the columns `bytes` of both directions.
fn network(dev: &str) -> (u64, u64) {
    let counted = dev.lines().filter_map(|line| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = counts.split_whitespace().map_while(|n| n.parse().ok()).collect();
        (name.trim() != "lo").then_some((*counts.first()?, *counts.get(8)?))
    });
    counted.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// `some avg10=1.23 ..` in percent.
fn pressure(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some avg10="))?;
    let percent: f64 = some.split_whitespace().next()?.parse().ok()?;
    Some(percent / 100.0)
}

/// utime + stime in ticks and rss in pages. The second field may hold anything, `)` included.
fn ran_and_resident(stat: &[u8]) -> Option<(u64, u64)> {
    let after_name = stat.get(stat.iter().rposition(|byte| *byte == b')')? + 1..)?;
    let fields: Vec<&str> = std::str::from_utf8(after_name).ok()?.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some((number(11)? + number(12)?, number(21)?))
}

/// `ran waited slices`, the first two in nanoseconds.
fn waited(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        assert_eq!(busy_ticks("cpu  10 1 5 1000 50 2 3 4 9 0\ncpu0 1 1\n"), Some(25));
        let dev = "Inter-| Receive\n face |bytes\n    lo: 9 1 0 0 0 0 0 0 9 1 0\n  eth0: 100 1 0 0 0 \
                   0 0 0 200 2 0\n  eth1: 1 1 0 0 0 0 0 0 2 2 0\n";
        assert_eq!(network(dev), (101, 202));
        assert_eq!(available_kib("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2048));
        assert_eq!(pressure("some avg10=12.50 avg60=0.00 total=1\nfull avg10=0\n"), Some(0.125));
        let stat = b"7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 30 12 0 0 20 0 5 0 99 4096 300 0";
        assert_eq!(ran_and_resident(stat), Some((42, 300)));
        assert_eq!(waited("1511456 77 4\n"), Some(77));
    }

    #[test]
    fn what_is_malformed_is_nothing() {
        assert_eq!(busy_ticks("cpu  10 x"), None);
        assert_eq!(busy_ticks(""), None);
        assert_eq!(available_kib("MemAvailable:"), None);
        assert_eq!(pressure("some avg10=x"), None);
        assert_eq!(ran_and_resident(b"7 a S 1"), None);
        assert_eq!(ran_and_resident(b"7 (a)"), None);
        assert_eq!(waited(""), None);
    }

    #[test]
    fn this_host_and_this_process_are_seen() {
        let (before, own) = (host().unwrap(), process(std::process::id() as i32).unwrap());
        assert!(before.busy_s > 0.0 && before.available_mib > 0 && own.resident_mib > 0);
        assert!(process(i32::MAX).is_none());
        assert!(cores() >= 1.0);
    }
}
