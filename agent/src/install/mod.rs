//! The plugin's place on the host: its binary, its entry in the CNI configuration, and both kept there.
//!
//! Knows neither pods nor the kernel.
