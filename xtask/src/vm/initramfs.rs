//! What a guest boots into: the files of its initramfs, and the init script that prepares the system, runs the steps
//! and says how each one ended. How those words are read is told in `transcript`.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::Path,
};

use anyhow::{Context as _, Result};

use super::{binaries::Binaries, cpio::Archive, modules::Module, transcript::MARK};

/// Something the guest runs, as a line of shell. Its name has no blanks.
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) command: String,
}

/// What the guest does once it is up.
pub(super) enum Work {
    Steps(Vec<Step>),
    /// A shell on the console.
    Shell,
}

/// Writes the archive for one kernel.
pub(super) fn write(
    file: &Path,
    binaries: &Binaries,
    modules: &[Module],
    work: &Work,
) -> Result<()> {
    let create = || format!("cannot write {}", file.display());
    fs::create_dir_all(file.parent().with_context(create)?).with_context(create)?;
    let out = BufWriter::new(File::create(file).with_context(create)?);
    let mut archive = Archive::new(out);
    for dir in [
        "bin", "dev", "etc", "modules", "proc", "root", "run", "sys", "tmp", "var",
    ] {
        archive.directory(dir, 0o755)?;
    }
    // Needed before devtmpfs is mounted: by the kernel for init's own output, and for the word that mounting failed.
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.character_device("dev/ttyS1", 0o600, (4, 65))?;
    archive.symlink("var/run", "/run")?;
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.copy("bin/busybox", 0o755, &binaries.busybox)?;
    archive.copy("bin/culvert", 0o755, &binaries.culvert)?;
    archive.copy("bin/ztunnel-standin", 0o755, &binaries.standin)?;
    archive.copy("bin/vm-tests", 0o755, &binaries.tests)?;
    archive.copy("bin/lookup-tests", 0o755, &binaries.lookups)?;
    for module in modules {
        archive.file(
            &format!("modules/{}.ko", module.name),
            0o644,
            &module.content,
        )?;
    }
    archive.file("init", 0o755, script(modules, work).as_bytes())?;
    archive.finish().with_context(create)?;
    Ok(())
}

/// The init script. What programs write to their standard output goes to the second serial port, all else to the
/// console, so that a kernel message never lands in the middle of a test's result.
fn script(modules: &[Module], work: &Work) -> String {
    let mut script = String::from("#!/bin/busybox sh\n/bin/busybox --install -s /bin\n");
    script.push_str("export PATH=/bin HOME=/root CULVERT_BIN=/bin/culvert ZTUNNEL_STANDIN_BIN=/bin/ztunnel-standin\n");
    // The last close of a serial port waits until all is sent, so every use opens it anew.
    script.push_str(&format!(
        "say() {{ echo \"{MARK}$*\" >/dev/ttyS1; }}\n\
         off() {{ poweroff -f; }}\n\
         must() {{ \"$@\" || {{ say \"setup failed: $*\"; off; }}; }}\n\
         step() {{ sh -c \"$2\" >/dev/ttyS1; say \"exit $1 $?\"; }}\n"
    ));
    for (kind, place) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        script.push_str(&format!("must mount -t {kind} {kind} {place}\n"));
    }
    for module in modules {
        script.push_str(&format!("must insmod /modules/{}.ko\n", module.name));
    }
    script.push_str("must mkdir -p /run/netns\nmust ip link set lo up\nulimit -n 65536\nsay up\n");
    match work {
        Work::Steps(steps) => {
            for step in steps {
                script.push_str(&format!("step {} {}\n", step.name, quote(&step.command)));
            }
            script.push_str("say end\n");
        }
        Work::Shell => script.push_str("cd /root\nsetsid cttyhack sh\n"),
    }
    script.push_str("off\n");
    script
}

/// Quotes a word for the shell.
pub(super) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn the_script_is_one_a_shell_accepts() {
        let step = Step {
            name: "tests",
            command: format!("/bin/vm-tests {}", quote("it's")),
        };
        for work in [Work::Steps(vec![step]), Work::Shell] {
            let modules = [Module {
                name: "veth".into(),
                content: Vec::new(),
            }];
            let script = script(&modules, &work);
            let status = crate::cmd::command("sh")
                .args(["-n", "-c", &script])
                .status()
                .unwrap();
            assert!(status.success(), "{script}");
        }
    }

    #[test]
    fn modules_are_loaded_in_the_given_order() {
        let module = |name: &str| Module {
            name: name.into(),
            content: Vec::new(),
        };
        let script = script(&[module("llc"), module("bridge")], &Work::Shell);
        let at = |text: &str| script.find(text).unwrap();
        assert!(at("insmod /modules/llc.ko") < at("insmod /modules/bridge.ko"));
        assert!(at("insmod /modules/bridge.ko") < at("say up"));
    }
}
