//! The classes of bulk data, in the order in which they are sent.
//!
//! Invariant: a byte on the wire names a class for ever; `Class` orders from least to most urgent.

/// How urgent a batch is. Greater is more urgent: `HandOver > DeviceState > Pages > Blocks > Seed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// Disk chunks sent ahead of time; nobody waits for them.
    Seed = 0,
    /// Disk blocks that the guest wrote since.
    Blocks = 1,
    /// Guest memory.
    Pages = 2,
    /// State of the devices, sent while the guest is paused.
    DeviceState = 3,
    /// What decides which side may run the VM.
    HandOver = 4,
}

impl Class {
    /// Every class, least urgent first; a class's place is its `index`.
    pub const ALL: [Self; 5] =
        [Self::Seed, Self::Blocks, Self::Pages, Self::DeviceState, Self::HandOver];

    /// Place in [`Class::ALL`] and byte on the wire.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The class that `byte` names on the wire.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }

    /// The byte that names this class on the wire.
    pub const fn to_byte(self) -> u8 {
        self as u8
    }

    /// True for what is sent while the guest stands still. Such batches have memory of their own
    /// at the receiver and do not queue behind bulk.
    pub const fn is_urgent(self) -> bool {
        matches!(self, Self::DeviceState | Self::HandOver)
    }

    /// The name in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Seed => "seed",
            Self::Blocks => "blocks",
            Self::Pages => "pages",
            Self::DeviceState => "device-state",
            Self::HandOver => "hand-over",
        }
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_bytes_are_fixed() {
        assert!(Class::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        for (byte, class) in (0u8..).zip(Class::ALL) {
            assert_eq!(class.to_byte(), byte);
            assert_eq!(Class::from_byte(byte), Some(class));
        }
        assert_eq!(Class::from_byte(5), None);
    }
}
