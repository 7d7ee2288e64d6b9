//! The installer in real directories: links, modes, other programs that write at the same time, kills between two steps.
mod scratch;

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

use culvert::install::{Cause, Installer, Mode, Operation, active};
use scratch::Scratch;

const LIST: &str =
    "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}\n";
const OTHER: &str =
    "{\"cniVersion\":\"1.0.0\",\"name\":\"other\",\"plugins\":[{\"type\":\"ptp\"}]}\n";
const LONE: &str = "{\"cniVersion\":\"1.0.0\",\"name\":\"lone\",\"type\":\"bridge\"}\n";

#[test]
fn the_first_valid_configuration_counts() {
    let scratch = Scratch::new("active");
    scratch.put("00-empty.conflist", "");
    scratch.put("01-cut.conf", "{\"name\":");
    scratch.put("02-list-in-conf.conf", LIST);
    scratch.put(
        "03-none.conflist",
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
    );
    scratch.put("04-readme.txt", LIST);
    scratch.put("05-x.conflist.cilium_bak", LIST);
    fs::create_dir(scratch.conf("06-dir.conflist")).unwrap();
    symlink("/nowhere/x", scratch.conf("07-dangling.conflist")).unwrap();
    scratch.put("10-b.json", LONE);
    scratch.put("10-a.conflist", LIST);
    let files = active::scan(&scratch.root.join("net.d")).unwrap();
    let found = active::find(&files, None);
    assert_eq!(found.file.unwrap().name, "10-a.conflist");
    assert_eq!(found.passed.len(), 5, "{:?}", found.passed);
    assert!(
        found
            .passed
            .iter()
            .any(|p| p.contains("/nowhere/x") && p.contains("mount that directory"))
    );
    // By name, and by what we or the CNI may have made of that name.
    assert_eq!(
        active::find(&files, Some("10-b.json")).file.unwrap().name,
        "10-b.json"
    );
    assert_eq!(
        active::find(&files, Some("10-a.conf")).file.unwrap().name,
        "10-a.conflist"
    );
    let none = active::find(&files, Some("99-later.conflist"));
    assert!(none.file.is_none());
    assert!(
        none.waiting.contains("99-later.conflist"),
        "{}",
        none.waiting
    );
}

#[test]
fn without_a_configuration_it_waits_and_says_why() {
    let scratch = Scratch::new("waiting");
    let installer = scratch.installer(Mode::Auto);
    let plan = installer.plan().unwrap();
    assert!(
        plan.waiting
            .as_ref()
            .unwrap()
            .contains("no CNI configuration yet"),
        "{plan:?}"
    );
    // The plugin can be there already.
    installer.apply(&plan).unwrap();
    assert!(scratch.root.join("bin/culvert-cni").exists());
    scratch.put("10-a.conflist", "{");
    let why = installer.plan().unwrap().waiting.unwrap();
    assert!(why.contains("10-a.conflist"), "{why}");
}

#[test]
fn a_broken_configuration_that_runtimes_take_is_an_error_not_a_reason_to_take_the_next() {
    let scratch = Scratch::new("broken");
    scratch.put("20-good.conflist", LIST);
    for (name, content, wanted) in [
        (
            "10-version.conflist",
            LIST.replace("1.0.0", "0.2.0").into_bytes(),
            "cniVersion \"0.2.0\"",
        ),
        (
            "10-twice.conflist",
            LIST.replace("\"name\"", "\"name\":\"m\",\"name\"")
                .into_bytes(),
            "is there twice",
        ),
        (
            "10-latin.conflist",
            [&b"{\"x\":\"\xff\","[..], &LIST.as_bytes()[1..]].concat(),
            "is not UTF-8",
        ),
        (
            "10-big.conflist",
            format!("{LIST}{}", " ".repeat(5 << 20)).into_bytes(),
            "bytes, more than",
        ),
        (
            "10-noname.conf",
            LONE.replace("lone", "").into_bytes(),
            "no network `name`",
        ),
    ] {
        scratch.put(name, &content);
        let error = scratch.installer(Mode::Auto).plan().unwrap_err();
        let text = error.to_string();
        assert!(text.contains(wanted) && text.contains(name), "{text}");
        assert!(matches!(error.cause, Cause::Conflist(_)));
        assert_eq!(fs::read(scratch.conf(name)).unwrap(), content);
        fs::remove_file(scratch.conf(name)).unwrap();
    }
    assert_eq!(scratch.read("20-good.conflist"), LIST);
}

#[test]
fn a_link_stays_a_link_and_its_file_is_written() {
    let scratch = Scratch::new("link");
    let real = scratch.root.join("image/real");
    fs::write(&real, LIST).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("../image/real", scratch.conf("10-a.conflist")).unwrap();
    let installer = scratch.installer(Mode::Chained);
    let changed = || {
        let metadata = fs::metadata(scratch.root.join("net.d")).unwrap();
        (metadata.mtime(), metadata.mtime_nsec())
    };
    let before = changed();
    scratch.settle(&installer);
    assert_ne!(
        changed(),
        before,
        "runtimes look at their directory alone, and must notice"
    );
    assert_eq!(
        fs::read_link(scratch.conf("10-a.conflist"))
            .unwrap()
            .to_str(),
        Some("../image/real")
    );
    assert!(fs::read_to_string(&real).unwrap().contains("culvert-cni"));
    assert_eq!(fs::metadata(&real).unwrap().mode() & 0o777, 0o640);
    installer.uninstall().unwrap();
    assert_eq!(fs::read_to_string(&real).unwrap(), LIST);
}

#[test]
fn a_lone_configuration_behind_a_link_comes_back_as_a_link() {
    let scratch = Scratch::new("lone-link");
    let real = scratch.root.join("image/real");
    fs::write(&real, LONE).unwrap();
    symlink("../image/real", scratch.conf("10-a.conf")).unwrap();
    let installer = scratch.installer(Mode::Chained);
    scratch.settle(&installer);
    assert!(scratch.conf("10-a.conf").symlink_metadata().is_err());
    assert!(scratch.read("10-a.conflist").contains("culvert-cni"));
    installer.uninstall().unwrap();
    assert_eq!(
        fs::read_link(scratch.conf("10-a.conf")).unwrap().to_str(),
        Some("../image/real")
    );
    assert_eq!(fs::read_to_string(&real).unwrap(), LONE);
    assert!(!scratch.conf("10-a.conflist").exists());
}

#[test]
fn modes_are_those_of_the_original_and_ours_is_private() {
    let scratch = Scratch::new("modes");
    scratch.put("10-a.conflist", LIST);
    fs::set_permissions(
        scratch.conf("10-a.conflist"),
        fs::Permissions::from_mode(0o604),
    )
    .unwrap();
    scratch.settle(&scratch.installer(Mode::Chained));
    assert_eq!(scratch.mode("10-a.conflist"), 0o604);
    scratch.settle(&scratch.installer(Mode::OwnList));
    assert_eq!(scratch.mode("00-culvert.conflist"), 0o600);
    let mut options = scratch.options(Mode::OwnList);
    options.group_read = true;
    scratch.settle(&Installer::new(options));
    assert_eq!(scratch.mode("00-culvert.conflist"), 0o640);
    assert_eq!(
        fs::metadata(scratch.root.join("bin/culvert-cni"))
            .unwrap()
            .mode()
            & 0o7777,
        0o755
    );
}

#[test]
fn changing_the_mode_leaves_nothing_behind() {
    let scratch = Scratch::new("switch");
    scratch.put("10-a.conflist", LIST);
    scratch.put("20-b.conflist", OTHER);
    scratch.settle(&scratch.installer(Mode::Chained));
    scratch.settle(&scratch.installer(Mode::OwnList));
    assert_eq!(scratch.read("10-a.conflist"), LIST);
    assert!(scratch.read("00-culvert.conflist").contains("bridge"));
    scratch.settle(&scratch.installer(Mode::Chained));
    assert!(!scratch.conf("00-culvert.conflist").exists());
    assert!(scratch.read("10-a.conflist").contains("culvert-cni"));
    // Another CNI takes over: the entry moves there.
    scratch.put("05-new.conflist", OTHER);
    scratch.settle(&scratch.installer(Mode::Chained));
    assert!(scratch.read("05-new.conflist").contains("culvert-cni"));
    assert_eq!(scratch.read("10-a.conflist"), LIST);
    scratch.settle(&scratch.installer(Mode::Standalone));
    assert_eq!(scratch.read("05-new.conflist"), OTHER);
    assert!(
        scratch
            .read("YYY-culvert-cni.conf")
            .contains("\"type\": \"culvert-cni\"")
    );
    assert_eq!(scratch.read("20-b.conflist"), OTHER);
}

#[test]
fn the_own_list_sorts_first_or_says_why_not() {
    let scratch = Scratch::new("own-name");
    for (theirs, ours) in [
        ("05-cilium.conflist", "00-culvert.conflist"),
        ("00-a.conflist", "00-0-culvert.conflist"),
        ("00-.conflist", "0-culvert.conflist"),
    ] {
        scratch.put(theirs, LIST);
        let plan = scratch.installer(Mode::OwnList).plan().unwrap();
        assert_eq!(plan.entry_in.unwrap().file_name().unwrap(), ours);
        fs::remove_file(scratch.conf(theirs)).unwrap();
    }
    scratch.put("05-a.conflist", LIST);
    let mut options = scratch.options(Mode::OwnList);
    options.own_name = Some("10-late.conflist".into());
    let error = Installer::new(options.clone())
        .plan()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("does not sort before 05-a.conflist") && error.contains("--own-name"),
        "{error}"
    );
    options.own_name = Some("00-mine.conf".into());
    assert!(
        Installer::new(options.clone())
            .plan()
            .unwrap_err()
            .to_string()
            .contains("called .conflist")
    );
    options.own_name = Some("01-mine.conflist".into());
    scratch.put("01-mine.conflist", OTHER);
    scratch.put("00-a.conflist", LIST);
    fs::remove_file(scratch.conf("00-a.conflist")).unwrap();
    // It is theirs, so it is the active one, and ours does not sort before itself.
    assert!(Installer::new(options).plan().is_err());
    assert_eq!(scratch.read("01-mine.conflist"), OTHER);
}

#[test]
fn a_change_in_between_is_seen_not_overwritten() {
    let scratch = Scratch::new("between");
    scratch.put("10-a.conflist", LIST);
    let installer = scratch.installer(Mode::Chained);
    let plan = installer.plan().unwrap();
    scratch.put("10-a.conflist", OTHER);
    let error = installer.apply(&plan).unwrap_err();
    assert!(matches!(error.cause, Cause::Changed), "{error}");
    assert_eq!(scratch.read("10-a.conflist"), OTHER);
    fs::remove_file(scratch.conf("10-a.conflist")).unwrap();
    assert!(installer.apply(&plan).is_err());
    assert!(!scratch.conf("10-a.conflist").exists());
    // And no temporary file is left.
    assert!(
        !scratch.picture().keys().any(|k| k.contains(".tmp")),
        "{:?}",
        scratch.picture().keys()
    );
}

#[test]
fn only_our_own_unfinished_files_are_swept() {
    let scratch = Scratch::new("sweep");
    scratch.put("10-a.conflist", LIST);
    scratch.put(".culvert-123-4.tmp", "half");
    scratch.put(".other.tmp", "theirs");
    fs::write(scratch.root.join("bin/.culvert-9-9.tmp"), "half").unwrap();
    // One that is being written right now is locked.
    let live = fs::File::create(scratch.conf(".culvert-77-0.tmp")).unwrap();
    let live = nix::fcntl::Flock::lock(live, nix::fcntl::FlockArg::LockExclusive).unwrap();
    scratch.settle(&scratch.installer(Mode::Chained));
    assert!(!scratch.conf(".culvert-123-4.tmp").exists());
    assert!(!scratch.root.join("bin/.culvert-9-9.tmp").exists());
    assert!(scratch.conf(".other.tmp").exists());
    assert!(scratch.conf(".culvert-77-0.tmp").exists());
    drop(live);
}

#[test]
fn newer_and_older_replace_each_other() {
    let scratch = Scratch::new("versions");
    scratch.put("10-a.conflist", LIST);
    scratch.settle(&scratch.installer(Mode::Chained));
    let inode = |s: &Scratch| fs::metadata(s.root.join("bin/culvert-cni")).unwrap().ino();
    let first = inode(&scratch);
    // The next release: another binary, another key.
    scratch.plugin("#!/bin/sh\necho two\n");
    let mut newer = scratch.options(Mode::Chained);
    newer
        .entry
        .insert("fromTheFuture".into(), serde_json::json!({"a": [1, 2]}));
    scratch.settle(&Installer::new(newer));
    assert_ne!(
        inode(&scratch),
        first,
        "a new file takes the place, so that running plugins keep theirs"
    );
    assert!(scratch.read("10-a.conflist").contains("fromTheFuture"));
    scratch.plugin("#!/bin/sh\necho one\n");
    let older = scratch.installer(Mode::Chained);
    scratch.settle(&older);
    assert!(!scratch.read("10-a.conflist").contains("fromTheFuture"));
    assert!(
        fs::read_to_string(scratch.root.join("bin/culvert-cni"))
            .unwrap()
            .contains("one")
    );
    older.uninstall().unwrap();
    assert_eq!(scratch.read("10-a.conflist"), LIST);
}

#[test]
fn what_cilium_put_aside_is_cleaned_up() {
    let scratch = Scratch::new("aside");
    scratch.put_real("cilium");
    let installer = scratch.installer(Mode::Auto);
    scratch.settle(&installer);
    let own = scratch.conf("00-culvert.conflist");
    fs::rename(&own, scratch.conf("00-culvert.conflist.cilium_bak")).unwrap();
    scratch.settle(&installer);
    assert!(own.exists());
    assert!(!scratch.conf("00-culvert.conflist.cilium_bak").exists());
    // A list of somebody else's that Cilium put aside with our entry in it is released at the end.
    let chained = LIST.replace("]", ",{\"type\":\"culvert-cni\"}]");
    scratch.put("10-a.conflist.cilium_bak", chained);
    scratch.settle(&installer);
    installer.uninstall().unwrap();
    assert_eq!(scratch.read("10-a.conflist.cilium_bak"), LIST);
}

#[test]
fn a_lone_file_written_again_is_wrapped_again() {
    let scratch = Scratch::new("again");
    scratch.put("10-a.conf", LONE);
    let installer = scratch.installer(Mode::Auto);
    scratch.settle(&installer);
    let new = LONE.replace("lone", "newer");
    scratch.put("10-a.conf", &new);
    scratch.settle(&installer);
    assert!(!scratch.conf("10-a.conf").exists());
    assert!(scratch.read("10-a.conflist").contains("newer"));
    // A list of theirs of the name we would take is not overwritten.
    installer.uninstall().unwrap();
    assert_eq!(scratch.read("10-a.conf"), new);
    scratch.put("10-a.conflist", OTHER);
    scratch.settle(&installer);
    assert_eq!(scratch.read("10-a.conflist"), OTHER);
    assert!(scratch.read("10-a.conf.conflist").contains("newer"));
    let files = active::scan(&scratch.root.join("net.d")).unwrap();
    assert_eq!(
        active::find(&files, None).file.unwrap().name,
        "10-a.conf.conflist"
    );
}

#[test]
fn every_step_alone_leaves_a_configuration_that_counts() {
    // As after kill -9 between any two steps: a valid configuration, with our entry or without, and a second run that ends
    // where the first would have.
    for fixture in ["cilium", "bridge-conf", "calico", "json"] {
        let steps = {
            let scratch = Scratch::new(&format!("steps-{fixture}"));
            scratch.put_real(fixture);
            scratch
                .installer(Mode::Auto)
                .plan()
                .unwrap()
                .operations
                .len()
        };
        for done in 0..=steps {
            let scratch = Scratch::new(&format!("step-{fixture}-{done}"));
            scratch.put_real(fixture);
            let before = scratch.picture();
            let installer = scratch.installer(Mode::Auto);
            let mut plan = installer.plan().unwrap();
            plan.operations.truncate(done);
            installer.apply(&plan).unwrap();
            let files = active::scan(&scratch.root.join("net.d")).unwrap();
            assert!(
                active::find(&files, None).file.is_some(),
                "{fixture} after {done}"
            );
            scratch.settle(&installer);
            // The way back, stopped at every step as well.
            let mut plan = installer.plan_uninstall().unwrap();
            plan.operations.truncate(done);
            installer.apply(&plan).unwrap();
            let files = active::scan(&scratch.root.join("net.d")).unwrap();
            assert!(
                active::find(&files, None).file.is_some(),
                "{fixture} back {done}"
            );
            installer.uninstall().unwrap();
            assert_eq!(scratch.picture(), before, "{fixture} {done}");
        }
    }
}

#[test]
fn a_plan_names_the_plugin_before_the_entry_and_the_other_way_round() {
    let scratch = Scratch::new("order");
    scratch.put("10-a.conflist", LIST);
    let installer = scratch.installer(Mode::Chained);
    let plan = installer.plan().unwrap();
    assert!(matches!(
        plan.operations[..],
        [Operation::InstallPlugin { .. }, Operation::Write { .. }]
    ));
    installer.apply(&plan).unwrap();
    let plan = installer.plan_uninstall().unwrap();
    assert!(matches!(
        plan.operations[..],
        [Operation::Write { .. }, Operation::Remove { .. }]
    ));
}

#[test]
fn a_read_only_directory_names_its_mount() {
    use nix::mount::{MsFlags, mount, umount};
    let scratch = Scratch::new("read-only");
    let dir = scratch.root.join("net.d");
    let flags = MsFlags::empty();
    mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, None::<&str>)
        .unwrap_or_else(|e| panic!("cannot mount a tmpfs: {e}; run the tests as root"));
    scratch.put("10-a.conflist", LIST);
    mount(
        None::<&str>,
        &dir,
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .unwrap();
    let installer = scratch.installer(Mode::Chained);
    let result = installer.apply(&installer.plan().unwrap());
    umount(&dir).unwrap();
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("{} (tmpfs) is mounted read-only", dir.display())),
        "{text}"
    );
    assert!(!error.retryable());
}

#[test]
fn what_somebody_else_wrote_for_our_plugin_stays() {
    let scratch = Scratch::new("foreign-lone");
    let lone = LONE.replace("bridge", "culvert-cni");
    scratch.put("05-nad.conf", &lone);
    scratch.put("10-a.conflist", LIST);
    let installer = scratch.installer(Mode::Auto);
    assert_eq!(
        installer.plan().unwrap().active.as_deref(),
        Some("10-a.conflist")
    );
    scratch.settle(&installer);
    installer.uninstall().unwrap();
    assert_eq!(scratch.read("05-nad.conf"), lone);
    assert_eq!(scratch.read("10-a.conflist"), LIST);
}
