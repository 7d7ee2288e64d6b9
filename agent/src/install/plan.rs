//! From what lies in the directories to an ordered list of changes, and that list as text.
//!
//! Pure: what was found goes in, operations come out. Nothing here touches a file.

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use super::operation::Operation;
use super::{
    Mode, Options,
    active::{self, File, Share},
    conflist::{self, Conf, PLUGIN, Released},
    error::Error,
};

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Plan {
    /// Why our entry cannot be put in yet; the operations are those that can be done all the same.
    pub waiting: Option<String>,
    /// The configuration that pods start with, without us.
    pub active: Option<String>,
    /// The file that holds our entry once this is done.
    pub entry_in: Option<PathBuf>,
    /// The changes.
    pub operations: Vec<Operation>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Lists of ours whose original is gone. If it stays away they have to go too: they would have pods start by a plugin
    /// that may be uninstalled.
    pub orphans: Vec<Operation>,
}

/// What to do about the configurations.
pub(super) fn install(options: &Options, files: &[File]) -> Result<Plan, Error> {
    let mut plan = Plan::default();
    if options.mode == Mode::Standalone {
        standalone(options, files, &mut plan)?;
        return Ok(plan);
    }
    let found = active::find(files, options.conf_name.as_deref());
    plan.notes.extend(found.passed.iter().map(|p| {
        format!("passed over {p}; some runtimes refuse all configurations because of it: correct or remove the file")
    }));
    let Some(active) = found.file else {
        plan.waiting = Some(found.waiting);
        let lists = files
            .iter()
            .filter(|f| !f.is_backup() && f.share() == Share::Whole);
        plan.orphans = lists
            .map(|f| remove(f, "the configuration it was a copy of is gone"))
            .collect();
        return Ok(plan);
    };
    plan.active = Some(active.name.clone());
    let failed = |e| Error::conflist("edit", &active.path, e);
    if let Err(why) = &active.content {
        return Err(Error::wrong(
            "read",
            &active.path,
            why.clone(),
            "correct it, or remove it so that the next one counts",
        ));
    }
    let conf = Conf::parse(&active.name, active.bytes()).map_err(failed)?;
    let own = match options.mode {
        Mode::OwnList => true,
        // Cilium writes its file anew at every start of its agent: beside it, only a file of our own lasts.
        Mode::Auto => conf.types().iter().any(|t| t == "cilium-cni"),
        Mode::Chained | Mode::Standalone => false,
    };
    for istio in conf.types().iter().filter(|t| conflist::is_istio(t)) {
        plan.notes.push(format!(
            "the entry of {istio} is not carried over: two programs must not capture the same pods; for sidecars, run \
             istio-cni with ambient off and --chained, and it adds itself again"
        ));
    }
    let kept = if own {
        own_list(options, files, active, &mut plan)?
    } else if conflist::is_list(&active.name) {
        let after = conf.chain(&options.entry).map_err(failed)?;
        plan.write(active, after, "chain our entry");
        active.path.clone()
    } else {
        wrap(options, files, active, &conf, &mut plan)?
    };
    // Last, so that there is a configuration with our entry at every moment.
    for file in files.iter().filter(|f| f.path != kept) {
        if file.is_backup() {
            if file.share() == Share::Whole {
                plan.operations
                    .push(remove(file, "a list of ours that Cilium has put aside"));
            }
        } else if !plan.changes(&file.path) {
            plan.release(file, files, "not the configuration that counts");
        }
    }
    plan.entry_in = Some(kept);
    Ok(plan)
}

fn standalone(options: &Options, files: &[File], plan: &mut Plan) -> Result<(), Error> {
    let name = options
        .conf_name
        .clone()
        .unwrap_or_else(|| format!("YYY-{PLUGIN}.conf"));
    let path = options.conf_dir.join(&name);
    let there = files.iter().find(|f| f.name == name);
    if let Some(file) = there
        && file.share() != Share::Whole
    {
        return Err(taken(&path));
    }
    plan.write_own(
        options,
        &path,
        there,
        conflist::standalone(&options.entry),
        "our plugin for those who call it",
    );
    for file in files.iter().filter(|f| f.path != path && !f.is_backup()) {
        plan.release(file, files, "our plugin is not chained");
    }
    plan.entry_in = Some(path);
    Ok(())
}

/// A list of ours that sorts before `active`.
fn own_list(
    options: &Options,
    files: &[File],
    active: &File,
    plan: &mut Plan,
) -> Result<PathBuf, Error> {
    // An entry that was chained before goes, and must not be copied.
    let failed = |e| Error::conflist("copy", &active.path, e);
    let (name, content) = match conflist::release(&active.name, active.bytes()).map_err(failed)? {
        Released::Edited(text) => (active.name.clone(), text),
        Released::Unwrapped(was, text) => (was.name, text),
        Released::NotOurs | Released::Nothing => (
            active.name.clone(),
            String::from_utf8_lossy(active.bytes()).into_owned(),
        ),
    };
    let own = match &options.own_name {
        Some(own) if !conflist::is_list(own) => {
            return Err(Error::wrong(
                "write",
                &options.conf_dir.join(own),
                "a list of plugins has to be called .conflist",
                "change --own-name or ISTIO_OWNED_CNI_CONFIG_FILENAME",
            ));
        }
        Some(own) if *own >= name => {
            return Err(Error::wrong(
                "write",
                &options.conf_dir.join(own),
                format!("its name does not sort before {name}, which would stay in use"),
                "change --own-name or ISTIO_OWNED_CNI_CONFIG_FILENAME",
            ));
        }
        Some(own) => own.clone(),
        None => own_name(&name).ok_or_else(|| {
            Error::wrong(
                "write",
                &options.conf_dir,
                format!("no name of ours sorts before {name}"),
                "give one with --own-name or ISTIO_OWNED_CNI_CONFIG_FILENAME",
            )
        })?,
    };
    let path = options.conf_dir.join(&own);
    let there = files.iter().find(|f| f.name == own);
    if there.is_some_and(|f| f.share() != Share::Whole) {
        return Err(taken(&path));
    }
    let conf = Conf::parse(&name, content.as_bytes()).map_err(failed)?;
    let after = conf.own_list(&name, &options.entry).map_err(failed)?;
    plan.write_own(
        options,
        &path,
        there,
        after,
        &format!("a list of our own with the plugins of {name}"),
    );
    Ok(path)
}

fn taken(path: &Path) -> Error {
    Error::wrong(
        "write",
        path,
        "there is a file of that name that is not ours",
        "give ours another name with --own-name, ISTIO_OWNED_CNI_CONFIG_FILENAME or CNI_CONF_NAME",
    )
}

/// The name of a list of ours that runtimes find before `theirs`.
fn own_name(theirs: &str) -> Option<String> {
    [
        "00-culvert.conflist",
        "00-0-culvert.conflist",
        "0-culvert.conflist",
    ]
    .into_iter()
    .find(|ours| *ours < theirs)
    .map(str::to_owned)
}

/// A list in place of a lone configuration. The list comes first: as long as both are there, the old one counts.
fn wrap(
    options: &Options,
    files: &[File],
    active: &File,
    conf: &Conf<'_>,
    plan: &mut Plan,
) -> Result<PathBuf, Error> {
    let stem = active
        .name
        .rsplit_once('.')
        .map_or(active.name.as_str(), |(stem, _)| stem);
    let free = |name: &String| {
        let there = files.iter().find(|f| f.name == *name);
        let wraps = |f: &File| matches!(conflist::release(&f.name, f.bytes()), Ok(Released::Unwrapped(was, _)) if was.name == active.name);
        there.is_none_or(wraps)
    };
    // Where there is another list of that name, ours has to sort before it.
    let names = [
        format!("{stem}.conflist"),
        format!("{}.conflist", active.name),
    ];
    let Some(name) = names.into_iter().find(free) else {
        return Err(taken(&options.conf_dir.join(format!("{stem}.conflist"))));
    };
    let path = options.conf_dir.join(&name);
    let link = active
        .link
        .as_ref()
        .map(|l| l.to_string_lossy().into_owned());
    let after = conf
        .wrap(&active.name, link, &options.entry)
        .map_err(|e| Error::conflist("wrap", &active.path, e))?;
    let there = files.iter().find(|f| f.name == name);
    plan.operations.push(Operation::Write {
        path: path.clone(),
        before: there.map(|f| f.bytes().to_vec()),
        after,
        mode: active.mode,
        owner: Some(active.owner),
        why: format!("a list that holds {} and our entry", active.name),
    });
    plan.operations
        .push(remove(active, "the list takes its place"));
    Ok(path)
}

/// What to do to be gone. What cannot be undone is named, and does not keep the rest.
pub(super) fn uninstall(files: &[File]) -> Plan {
    let mut plan = Plan::default();
    for file in files {
        plan.release(file, files, "uninstall");
    }
    plan
}

fn remove(file: &File, why: &str) -> Operation {
    // A link goes, what it leads to stays.
    Operation::Remove {
        path: file.path.clone(),
        before: Some(file.bytes().to_vec()),
        why: why.to_owned(),
    }
}

impl Plan {
    /// Whether all is as it should be.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.waiting.is_none() && self.operations.is_empty()
    }

    fn changes(&self, path: &Path) -> bool {
        self.operations.iter().any(|o| o.path() == path)
    }

    fn write(&mut self, file: &File, after: String, why: &str) {
        if after.as_bytes() != file.bytes() {
            self.operations.push(Operation::Write {
                path: file.target.clone(),
                before: Some(file.bytes().to_vec()),
                after,
                mode: file.mode,
                owner: Some(file.owner),
                why: why.to_owned(),
            });
        }
    }

    fn write_own(
        &mut self,
        options: &Options,
        path: &Path,
        there: Option<&File>,
        after: String,
        why: &str,
    ) {
        let mode = if options.group_read { 0o640 } else { 0o600 };
        if there
            .is_some_and(|f| f.bytes() == after.as_bytes() && f.mode == mode && f.link.is_none())
        {
            return;
        }
        self.operations.push(Operation::Write {
            path: path.to_owned(),
            before: there.map(|f| f.bytes().to_vec()),
            after,
            mode,
            owner: None,
            why: why.to_owned(),
        });
    }

    /// Takes us out of a file.
    fn release(&mut self, file: &File, files: &[File], why: &str) {
        let released = match conflist::release(&file.name, file.bytes()) {
            Ok(released) => released,
            Err(error) => {
                if file
                    .bytes()
                    .windows(PLUGIN.len())
                    .any(|w| w == PLUGIN.as_bytes())
                {
                    self.notes.push(format!(
                        "{} names {PLUGIN} but cannot be edited: {error}; take the entry out by hand",
                        file.path.display()
                    ));
                }
                return;
            }
        };
        match released {
            Released::NotOurs => {}
            Released::Nothing => self.operations.push(remove(file, why)),
            Released::Edited(text) => self.write(file, text, &format!("take our entry out: {why}")),
            Released::Unwrapped(was, text) => {
                let suffix = if file.is_backup() { ".cilium_bak" } else { "" };
                let name = format!("{}{suffix}", was.name);
                let path = file.path.with_file_name(&name);
                // The CNI may have written its own again.
                if !files.iter().any(|f| f.name == name) {
                    self.operations.push(match was.link {
                        Some(to) => Operation::Link {
                            path,
                            to: to.into(),
                        },
                        None => Operation::Write {
                            path,
                            before: None,
                            after: text,
                            mode: file.mode,
                            owner: Some(file.owner),
                            why: format!("as it was before it became a list: {why}"),
                        },
                    });
                }
                self.operations.push(remove(file, why));
            }
        }
    }
}
