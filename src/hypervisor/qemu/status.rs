//! What a running QEMU says of itself, in the words of [`crate::hypervisor`].
//!
//! Invariant: QEMU is asked each time; nothing in here is remembered.

use std::path::Path;

use serde_json::{Value, json};

use super::disk::DiskNode;
use super::qmp::Qmp;
use crate::hypervisor::spec::ImageFormat;
use crate::hypervisor::{HypervisorError, VmSpec};

/// The block node behind each disk of the description. A VM that we started has a node of the
/// disk's own name; of another's the node is found by the guest's device, or by the image.
pub(super) async fn disk_nodes(qmp: &Qmp, spec: &VmSpec) -> Result<Vec<DiskNode>, HypervisorError> {
    let devices = qmp.execute("query-block", json!({})).await?;
    let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    spec.disks
        .iter()
        .map(|disk| {
            let image = disk.location.as_path().and_then(Path::to_str);
            let device = devices
                .iter()
                .find(|device| names(device).any(|name| name == disk.id))
                .or_else(|| devices.iter().find(|device| image.is_some() && file(device) == image));
            device
                .and_then(|device| device["inserted"]["node-name"].as_str())
                .map(|node| DiskNode { id: disk.id.clone(), node: node.to_owned() })
                .ok_or_else(|| HypervisorError::Unexpected {
                    vm: spec.name.clone(),
                    detail: format!("it has no disk {} as its description says", disk.id),
                })
        })
        .collect()
}

/// What a disk may go by: its node, its device, its drive.
fn names(device: &Value) -> impl Iterator<Item = &str> {
    let node = device["inserted"]["node-name"].as_str();
    let drive = device["device"].as_str();
    // `/machine/peripheral/ID/virtio-backend` or just the id.
    let qdev = device["qdev"].as_str().and_then(|path| {
        path.strip_prefix("/machine/peripheral/").map_or(Some(path), |rest| rest.split('/').next())
    });
    [node, drive, qdev].into_iter().flatten().filter(|name| !name.is_empty())
}

fn file(device: &Value) -> Option<&str> {
    device["inserted"]["image"]["filename"].as_str()
}

/// The format of an image by its first bytes; `None` if it cannot be read.
pub(super) fn image_format(path: &Path) -> Option<ImageFormat> {
    use std::io::Read;

    let mut magic = [0; 4];
    std::fs::File::open(path).ok()?.read_exact(&mut magic).ok()?;
    // "QFI\xfb": QEMU's docs/interop/qcow2.
    Some(if magic == [0x51, 0x46, 0x49, 0xfb] { ImageFormat::Qcow2 } else { ImageFormat::Raw })
}
