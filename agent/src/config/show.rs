//! The settings in force, for `culvert agent --print-config`.

use serde::Serialize;

use super::{KEYS, Loaded, Origin};

/// One setting in force.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// The key.
    pub key: &'static str,
    /// Its value; empty = none.
    pub value: String,
    /// Where it comes from.
    #[serde(serialize_with = "as_text")]
    pub from: Origin,
}

fn as_text<S: serde::Serializer>(origin: &Origin, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(origin)
}

/// Every setting, in the order of the keys.
#[must_use]
pub fn settings(loaded: &Loaded) -> Vec<Setting> {
    KEYS.iter()
        .zip(loaded.config.texts())
        .zip(&loaded.origins)
        .map(|((key, value), origin)| Setting {
            key: key.name,
            value,
            from: origin.clone(),
        })
        .collect()
}
