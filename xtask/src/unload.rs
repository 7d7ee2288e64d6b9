//! `cargo xtask unload`: undoes `load`.

use anyhow::Result;

use crate::{
    bins,
    cmd::run,
    host,
    project::{Profile, Project},
};

/// Runs the verb.
pub(crate) fn main() -> Result<()> {
    host::require_root("unload")?;
    let project = Project::find();
    bins::ensure(&project, Profile::Dev, &["culvert"])?;
    run(bins::command(&project, Profile::Dev, "culvert").arg("unload"))
}
