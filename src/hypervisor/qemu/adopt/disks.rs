//! Disks of an adopted VM: which image is behind which device. Pure.

use std::path::PathBuf;

use serde_json::Value;

use super::board::take_options;
use super::cmdline::{Opt, Props, as_switch};
use super::describe::{Findings, Placed, location};
use super::{Observed, QomDevice};
use crate::hypervisor::spec::host::HostPolicy;
use crate::hypervisor::spec::{
    CacheMode, Chipset, DiskBus, DiskSpec, ImageFormat, ImageLocation, OptionValue,
};

/// Drives and block nodes as the command line has them, by the names that devices use.
#[derive(Debug, Default)]
pub(super) struct Backends {
    drives: Vec<Props>,
    nodes: Vec<Props>,
}

impl Backends {
    pub(super) fn read(options: &[Opt], findings: &mut Findings) -> Self {
        let mut all = Self::default();
        for option in options {
            let value = option.value.as_deref().unwrap_or_default();
            let into = match option.name.as_str() {
                "drive" => &mut all.drives,
                "blockdev" => &mut all.nodes,
                _ => continue,
            };
            match Props::parse(value, "") {
                Ok(props) => into.push(props),
                Err(e) => findings.unknown(format!("-{} {value}: {e}", option.name)),
            }
        }
        all
    }

    /// A property of the drive or node with this name; of drives without one, that with this file.
    fn property(&self, drive: &str, node: &str, file: &str, key: &str) -> Option<&str> {
        let by = |list: &[Props], name: &str, value: &str| -> Option<usize> {
            list.iter().position(|p| p.get(name) == Some(value))
        };
        let found = by(&self.drives, "id", drive)
            .filter(|_| !drive.is_empty())
            .map(|i| &self.drives[i])
            .or_else(|| by(&self.nodes, "node-name", node).map(|i| &self.nodes[i]))
            .or_else(|| by(&self.drives, "file", file).map(|i| &self.drives[i]));
        let found = found?;
        found.get(key).or_else(|| {
            // A format node may leave it to the file's node below it.
            let below = found.get("file")?;
            by(&self.nodes, "node-name", below).and_then(|i| self.nodes[i].get(key))
        })
    }

    /// Whether a nameless device of a drive's own belongs to this name.
    pub(super) fn made_by_drive(&self, drive: &str) -> bool {
        self.drives.iter().any(|p| {
            let own = !matches!(p.get("if"), Some("none"));
            own && (p.get("id") == Some(drive) || (p.get("id").is_none() && !drive.is_empty()))
        })
    }
}

/// The block device behind a device, by the path that QEMU gives for it.
pub(super) fn block_of<'a>(observed: &'a Observed, device: &QomDevice) -> Option<&'a Value> {
    let id = device.path.strip_prefix("/machine/peripheral/");
    observed.blocks.iter().find(|block| {
        block["qdev"].as_str().is_some_and(|q| {
            let q = q.strip_suffix("/virtio-backend").unwrap_or(q);
            q == device.path || Some(q) == id
        })
    })
}

/// What a disk is looked up in.
pub(super) struct Sources<'a> {
    pub(super) observed: &'a Observed,
    pub(super) backends: &'a Backends,
    pub(super) policy: &'a HostPolicy,
}

/// Where a disk's device is.
pub(super) struct Seat {
    pub(super) bus: DiskBus,
    pub(super) placed: Placed,
}

/// Describes one disk; `None` and a finding if it cannot be.
pub(super) fn disk(
    id: String,
    device: &QomDevice,
    mut props: Props,
    seat: Seat,
    sources: &Sources<'_>,
    findings: &mut Findings,
) -> Option<DiskSpec> {
    let Sources { observed, backends, policy } = *sources;
    let what = format!("disk {id}");
    let Some(block) = block_of(observed, device) else {
        findings.unknown(format!("{what}: QEMU names no image for it"));
        return None;
    };
    let inserted = &block["inserted"];
    let drive = block["device"].as_str().unwrap_or_default();
    let node = inserted["node-name"].as_str().unwrap_or_default();
    let format = match inserted["drv"].as_str() {
        Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        // A file without a format on top is its bytes.
        Some("file" | "host_device") => ImageFormat::Raw,
        other => {
            findings.unknown(format!(
                "{what}: its image is {}: raw and qcow2 are known",
                other.unwrap_or("not inserted")
            ));
            return None;
        }
    };
    let location = image(&what, inserted, observed, policy, findings)?;
    if inserted["backing_file_depth"].as_u64().unwrap_or_default() > 0 {
        findings.note(format!("{what}: its backing file becomes part of its image at the target"));
    }
    let cache = &inserted["cache"];
    let on = |key: &str| cache[key] == Value::Bool(true);
    if on("no-flush") {
        findings
            .note(format!("{what}: flushes were ignored (cache=unsafe); the target obeys them"));
    }
    let cache = match (on("writeback"), on("direct")) {
        (false, _) => CacheMode::WriteThrough,
        (true, true) => CacheMode::None,
        (true, false) => CacheMode::Writeback,
    };
    let limits = ["iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr"];
    if limits.iter().any(|key| inserted[key].as_u64().is_some_and(|n| n > 0)) {
        findings.note(format!("{what}: its I/O limits are not carried over"));
    }
    let file = inserted["image"]["filename"].as_str().unwrap_or_default();
    let discard = backends.property(drive, node, file, "discard");
    let serial = props.take("serial").filter(|serial| !serial.is_empty());
    props.drop_all(&["driver", "id", "bus", "addr", "drive", "unit"]);
    props.drop_all(&["scsi-id", "lun", "channel", "share-rw", "iothread", "werror", "rerror"]);
    let mut options = take_options(&what, props, seat.bus.options(), findings);
    // The mode says it, as QEMU reports it, where it was not said twice.
    options.remove("write-cache");
    if seat.bus == DiskBus::Scsi
        && serial.is_none()
        && !drive.is_empty()
        && !options.contains_key("device_id")
    {
        // QEMU shows the drive's name to the guest then, which may find its disk by it.
        options.insert("device_id".into(), OptionValue::Word(drive.to_owned()));
    }
    let Placed { slot, controller, unit } = seat.placed;
    Some(DiskSpec {
        id,
        location,
        format,
        bus: seat.bus,
        slot,
        unit,
        controller,
        cache,
        discard: matches!(discard, Some(d) if d == "unmap" || as_switch(d) == Some(true)),
        serial,
        read_only: inserted["ro"] == Value::Bool(true),
        options,
    })
}

/// The image's file, if it is a plain one.
fn image(
    what: &str,
    inserted: &Value,
    observed: &Observed,
    policy: &HostPolicy,
    findings: &mut Findings,
) -> Option<ImageLocation> {
    let name = inserted["image"]["filename"].as_str().unwrap_or_default();
    let protocol = name.split_once(':').is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_lowercase() || b == b'+')
    });
    if name.is_empty() || protocol || name.starts_with("json:") {
        let shown: String = name.chars().take(200).collect();
        findings.unknown(format!("{what}: its image is no plain file: {shown:?}"));
        return None;
    }
    let path: PathBuf = observed.cwd.join(name);
    Some(location(&path, policy))
}

/// Bus and position of a disk on a built-in controller, from the name of its bus there.
pub(super) fn built_in(chipset: Option<Chipset>, device: &QomDevice) -> Option<(DiskBus, u8)> {
    let bus = device.bus.rsplit('/').next()?.strip_prefix("ide.")?.parse::<u8>().ok()?;
    let unit = device.unit.unwrap_or_default();
    match chipset? {
        Chipset::Q35 => Some((DiskBus::Sata, bus)),
        Chipset::I440fx => Some((DiskBus::Ide, bus.checked_mul(2)?.checked_add(unit)?)),
    }
}
