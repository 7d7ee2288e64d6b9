//! Pins that say they are another version's. The programs are this build's all the same: nobody has another.

use anyhow::{Result, ensure};
use culvert_lab::Lab;

use crate::bpf;

/// Stamps the pins with another version: one back, as an older build's, or one ahead. Which it says now.
pub fn restamp(lab: &Lab, step: i32) -> Result<u32> {
    let config = bpf::Map::pinned(&lab.bpffs().join("maps/CONFIG"))?;
    let key = 0_u32.to_ne_bytes();
    let mut value = config.get(&key)?;
    let (version, _) = value.split_at_mut(4);
    let there = u32::from_ne_bytes(version.try_into()?);
    let other = there.saturating_add_signed(step);
    ensure!(other != there, "there is no version {step:+}");
    version.copy_from_slice(&other.to_ne_bytes());
    config.set(&key, &value)?;
    Ok(other)
}
