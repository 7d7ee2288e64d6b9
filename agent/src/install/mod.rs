//! The plugin's place on the host: its binary, its entry in the CNI configuration, and both kept there.
//!
//! Knows neither pods nor the kernel. [`conflist`] edits text, [`active`] looks, [`Plan`] says what to change, `files`
//! changes it.

pub mod active;
pub mod conflist;
mod error;
mod files;
mod json;
mod operation;
mod options;
mod party;
mod plan;
mod watch;

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Mutex, PoisonError},
};

pub use conflist::{Entry, PLUGIN};
pub use error::{Cause, Error};
pub use options::{Mode, Options, beside_us, entry};
pub use plan::{Operation, Plan};
pub use watch::{State, Status};

/// Puts the plugin in its place and takes it away.
#[derive(Debug)]
pub struct Installer {
    options: Options,
    /// The programs that were last found to be the same: comparing megabytes every few seconds would be felt.
    compared: Mutex<Option<[files::Stamp; 2]>>,
}

impl Installer {
    /// Looks at nothing yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            compared: Mutex::new(None),
        }
    }

    /// Whether a plugin lies where ours does: this agent's, or one's before it.
    #[must_use]
    pub fn has_plugin(&self) -> bool {
        let program = self.options.bin_dir.join(PLUGIN);
        program.symlink_metadata().is_ok()
    }

    /// Whether what lies there can be run.
    #[must_use]
    pub fn has_usable_plugin(&self) -> bool {
        let there = self.options.bin_dir.join(PLUGIN).metadata();
        there.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    }

    /// What has to change for the plugin to be in place.
    pub fn plan(&self) -> Result<Plan, Error> {
        let o = &self.options;
        let mut before = self.leftovers();
        let program = o.bin_dir.join(PLUGIN);
        if !self.is_program(&o.plugin, &program)? {
            before.push(Operation::InstallPlugin {
                from: o.plugin.clone(),
                path: program,
            });
        }
        let mut plan = plan::install(o, &scan_if_there(&o.conf_dir)?)?;
        // The plugin before the entry that has it run.
        plan.operations.splice(0..0, before);
        Ok(plan)
    }

    /// What has to change for all of it to be gone.
    pub fn plan_uninstall(&self) -> Result<Plan, Error> {
        let o = &self.options;
        let configurations = scan_if_there(&o.conf_dir)?;
        let mut plan = plan::uninstall(&configurations);
        // The entry before the plugin that it has run.
        let program = o.bin_dir.join(PLUGIN);
        if program.symlink_metadata().is_ok() {
            let why = "uninstall".to_owned();
            plan.operations.push(Operation::Remove {
                path: program,
                before: None,
                why,
            });
        }
        plan.operations.extend(self.leftovers());
        Ok(plan)
    }

    /// Carries out a plan, in its order, up to the first failure.
    pub fn apply(&self, plan: &Plan) -> Result<(), Error> {
        plan.operations.iter().try_for_each(carry_out)?;
        self.make_noticed(plan)
    }

    /// Takes everything away. One file that cannot be changed does not keep the others. Where a [`Installer::watch`] still
    /// runs, it puts everything back.
    ///
    /// # Errors
    ///
    /// All that failed.
    pub fn uninstall(&self) -> Result<Plan, Vec<Error>> {
        let mut done = Plan::default();
        for attempt in 1.. {
            let plan = self.plan_uninstall().map_err(|e| vec![e])?;
            let mut failed: Vec<Error> = plan
                .operations
                .iter()
                .filter_map(|o| carry_out(o).err())
                .collect();
            failed.extend(self.make_noticed(&plan).err());
            done.notes.clone_from(&plan.notes);
            done.operations.extend(plan.operations);
            // Somebody wrote a file since it was read: the change has to be worked out anew.
            let changed = failed.iter().any(|e| matches!(e.cause, Cause::Changed));
            if changed && attempt < 10 {
                continue;
            }
            return if failed.is_empty() {
                Ok(done)
            } else {
                Err(failed)
            };
        }
        Ok(done)
    }

    /// Runtimes look at their directory alone: what changed behind a link to elsewhere they would not notice. A file that
    /// comes and goes makes them read all of it again.
    fn make_noticed(&self, plan: &Plan) -> Result<(), Error> {
        let Ok(dir) = self.options.conf_dir.canonicalize() else {
            return Ok(());
        };
        let elsewhere = |o: &Operation| match o {
            Operation::Write { path, .. } => {
                path.parent().and_then(|p| p.canonicalize().ok()) != Some(dir.clone())
            }
            _ => false,
        };
        if plan.operations.iter().any(elsewhere) {
            files::ripple(&dir)?;
        }
        Ok(())
    }

    fn is_program(&self, wanted: &Path, there: &Path) -> Result<bool, Error> {
        let stamps = [files::stamp(wanted), files::stamp(there)];
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        if let [Some(a), Some(b)] = &stamps
            && compared.as_ref() == Some(&[*a, *b])
        {
            return Ok(true);
        }
        *compared = None;
        let same = files::is_program(wanted, there)?;
        if same && let [Some(a), Some(b)] = stamps {
            *compared = Some([a, b]);
        }
        Ok(same)
    }

    fn leftovers(&self) -> Vec<Operation> {
        let dirs = [&self.options.bin_dir, &self.options.conf_dir];
        let stale = dirs.into_iter().flat_map(|d| files::stale(d));
        stale.map(|path| Operation::Sweep { path }).collect()
    }
}

/// What lies in the directory; a directory that is not there yet is as an empty one.
fn scan_if_there(dir: &Path) -> Result<Vec<active::File>, Error> {
    match active::scan(dir) {
        Err(Error {
            cause: Cause::System(e),
            ..
        }) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn carry_out(operation: &Operation) -> Result<(), Error> {
    match operation {
        Operation::Sweep { path } => files::remove(path, None),
        Operation::InstallPlugin { from, path } => files::program(from, path),
        Operation::Write {
            path,
            before,
            after,
            mode,
            owner,
            ..
        } => files::write(path, before.as_deref(), after.as_bytes(), *mode, *owner),
        Operation::Link { path, to } => files::link(path, to),
        Operation::Remove { path, before, .. } => files::remove(path, before.as_deref()),
    }
}
