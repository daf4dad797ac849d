//! A memory layout that was checked: region names to indices, and how many pages each region has.
//!
//! Invariant: a [`Regions`] exists only for a layout whose names are unique and have 1 to 255 bytes,
//! of at most [`REGIONS_MAX`] regions whose sizes add up without overflow.

use std::collections::HashMap;

use super::doubt::LayoutFault;
use crate::hypervisor::{MemoryLayout, PAGE_BYTES, Region};

/// Regions that a layout may have. A q35 machine has about ten, 256 hot-plugged modules add as many.
pub const REGIONS_MAX: usize = 4096;

/// QEMU's length byte allows no more.
const NAME_BYTES_MAX: usize = 255;

/// A checked layout, indexed.
#[derive(Debug)]
pub(super) struct Regions {
    section_id: u32,
    regions: Vec<Checked>,
    by_name: HashMap<Vec<u8>, u16>,
}

#[derive(Debug)]
struct Checked {
    name: Vec<u8>,
    pages: u64,
}

impl Regions {
    pub(super) fn check(layout: &MemoryLayout) -> Result<Self, LayoutFault> {
        if layout.regions.len() > REGIONS_MAX {
            return Err(LayoutFault::TooMany(REGIONS_MAX));
        }
        let mut total = 0u64;
        let mut by_name = HashMap::with_capacity(layout.regions.len());
        let mut regions = Vec::with_capacity(layout.regions.len());
        for (index, Region { name, bytes }) in layout.regions.iter().enumerate() {
            let index = u16::try_from(index).expect("REGIONS_MAX fits in 16 bits");
            if name.is_empty() || name.len() > NAME_BYTES_MAX {
                return Err(LayoutFault::Name);
            }
            total = total.checked_add(*bytes).ok_or(LayoutFault::Sizes)?;
            if by_name.insert(name.clone().into_bytes(), index).is_some() {
                return Err(LayoutFault::Twice(name.clone()));
            }
            regions.push(Checked {
                name: name.clone().into_bytes(),
                pages: bytes.div_ceil(PAGE_BYTES as u64),
            });
        }
        if total > i64::MAX as u64 {
            return Err(LayoutFault::Sizes);
        }
        Ok(Self { section_id: layout.section_id, regions, by_name })
    }

    pub(super) fn section_id(&self) -> u32 {
        self.section_id
    }

    pub(super) fn by_name(&self, name: &[u8]) -> Option<u16> {
        self.by_name.get(name).copied()
    }

    pub(super) fn contains(&self, region: u16, page: u64) -> bool {
        self.regions.get(usize::from(region)).is_some_and(|known| page < known.pages)
    }

    /// The name of a region that [`Self::contains`] or [`Self::by_name`] vouched for.
    pub(super) fn name(&self, region: u16) -> &[u8] {
        &self.regions[usize::from(region)].name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(regions: &[(&str, u64)]) -> MemoryLayout {
        let regions =
            regions.iter().map(|(name, bytes)| Region { name: (*name).into(), bytes: *bytes });
        MemoryLayout { section_id: 2, regions: regions.collect() }
    }

    #[test]
    fn limits_hold_on_both_sides() {
        let good = Regions::check(&layout(&[("pc.ram", 8192), ("rom", 1)])).unwrap();
        assert!(good.contains(0, 1) && !good.contains(0, 2));
        assert!(good.contains(1, 0) && !good.contains(1, 1) && !good.contains(2, 0));
        assert_eq!(good.by_name(b"rom"), Some(1));

        let fault = |regions: &[(&str, u64)]| Regions::check(&layout(regions)).unwrap_err();
        assert_eq!(fault(&[("", 1)]), LayoutFault::Name);
        assert_eq!(fault(&[(&"x".repeat(256), 1)]), LayoutFault::Name);
        assert!(Regions::check(&layout(&[(&"x".repeat(255), 1)])).is_ok());
        assert_eq!(fault(&[("a", 1), ("a", 1)]), LayoutFault::Twice("a".into()));
        assert_eq!(fault(&[("a", u64::MAX), ("b", 1)]), LayoutFault::Sizes);
        assert_eq!(fault(&[("a", 1 << 63)]), LayoutFault::Sizes);

        let names: Vec<String> = (0..=REGIONS_MAX).map(|n| n.to_string()).collect();
        let many: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 4096)).collect();
        assert!(Regions::check(&layout(&many[..REGIONS_MAX])).is_ok());
        assert_eq!(fault(&many), LayoutFault::TooMany(REGIONS_MAX));
    }
}
