//! `culvert install` and `culvert uninstall` as a person runs them, and as a power cut ends them.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod scratch;

use std::{
    fs,
    os::unix::net::UnixListener,
    process::{Command, Output, Stdio},
    time::Duration,
};

use scratch::Scratch;
use serde_json::Value;

#[expect(clippy::disallowed_methods, reason = "the program under test")]
fn culvert(scratch: &Scratch, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
    command.env_clear().args(arguments);
    command.arg("--cni-bin-dir").arg(scratch.root.join("bin"));
    command
        .arg("--cni-conf-dir")
        .arg(scratch.root.join("net.d"));
    command.arg("--bpffs").arg(scratch.root.join("no-bpffs"));
    if arguments[0] == "install" {
        command
            .arg("--plugin-binary")
            .arg(scratch.root.join("image/culvert-cni"));
    }
    command
}

fn run(scratch: &Scratch, arguments: &[&str]) -> Output {
    culvert(scratch, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_dry_run_prints_the_change_and_changes_nothing() {
    let scratch = Scratch::new("cli-dry");
    scratch.put_real("flannel");
    let before = scratch.picture();
    let shown = text(&run(&scratch, &["install", "--dry-run"]).stdout);
    assert!(
        shown.contains("+      \"type\": \"culvert-cni\","),
        "{shown}"
    );
    assert!(
        shown.contains("@@ ") && shown.ends_with("dry run: nothing was changed\n"),
        "{shown}"
    );
    let json: Value =
        serde_json::from_slice(&run(&scratch, &["install", "--dry-run", "-o", "json"]).stdout)
            .unwrap();
    assert_eq!(json["plan"]["active"], "10-flannel.conflist");
    let kinds: Vec<&Value> = json["plan"]["operations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| &o["operation"])
        .collect();
    assert_eq!(kinds, ["install-plugin", "write"]);
    assert_eq!(scratch.picture(), before);
}

#[test]
fn installing_and_uninstalling_is_as_if_nothing_had_been() {
    let scratch = Scratch::new("cli-both");
    scratch.put_real("bridge-conf");
    let before = scratch.picture();
    let done = run(
        &scratch,
        &["install", "--exclude-namespaces", "kube-system,infra"],
    );
    assert!(done.status.success(), "{}", text(&done.stderr));
    let conf: Value = serde_json::from_str(&scratch.read("100-crio-bridge.conflist")).unwrap();
    assert_eq!(
        conf["plugins"][1]["excludedNamespaces"],
        serde_json::json!(["infra", "kube-system"])
    );
    let again = run(
        &scratch,
        &["install", "--exclude-namespaces", "kube-system,infra"],
    );
    assert_eq!(text(&again.stdout), "nothing to change\n");
    let done = run(&scratch, &["uninstall"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(scratch.picture(), before);
}

#[test]
fn nothing_to_install_into_is_said_and_is_no_success() {
    let scratch = Scratch::new("cli-wait");
    let done = run(&scratch, &["install"]);
    assert!(!done.status.success());
    let said = text(&done.stderr);
    assert!(
        said.contains("no CNI configuration yet") && said.contains("run it again"),
        "{said}"
    );
}

#[test]
fn the_names_of_istio_cni_are_understood() {
    let scratch = Scratch::new("cli-istio");
    scratch.put_real("flannel");
    let with = |name: &str, value: &str| {
        let done = culvert(&scratch, &["install", "--dry-run", "-o", "json"])
            .env(name, value)
            .output()
            .unwrap();
        (
            serde_json::from_slice::<Value>(&done.stdout).unwrap_or_default(),
            text(&done.stderr),
        )
    };
    let entry_in = |json: &Value| {
        json["plan"]["entry_in"]
            .as_str()
            .unwrap_or_default()
            .rsplit('/')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        entry_in(&with("ISTIO_OWNED_CNI_CONFIG", "true").0),
        "00-culvert.conflist"
    );
    assert_eq!(
        entry_in(&with("CHAINED_CNI_PLUGIN", "false").0),
        "YYY-culvert-cni.conf"
    );
    let (waiting, _) = with("CNI_CONF_NAME", "99-x.conflist");
    assert!(
        waiting["plan"]["waiting"]
            .as_str()
            .unwrap()
            .contains("99-x.conflist"),
        "{waiting}"
    );
    let (excluded, _) = with("EXCLUDE_NAMESPACES", "a, b");
    assert!(excluded.to_string().contains(r#"\"b\""#), "{excluded}");
    assert!(
        with("CNI_CONF_GROUP_READ", "maybe")
            .1
            .contains("CNI_CONF_GROUP_READ is `maybe`")
    );
}

#[test]
fn uninstalling_under_a_running_agent_is_refused() {
    let scratch = Scratch::new("cli-agent");
    scratch.put_real("flannel");
    assert!(run(&scratch, &["install"]).status.success());
    let socket = scratch.root.join("agent.sock");
    let _agent = UnixListener::bind(&socket).unwrap();
    let socket = socket.to_str().unwrap();
    let refused = run(&scratch, &["uninstall", "--socket", socket]);
    assert!(!refused.status.success());
    assert!(
        text(&refused.stderr).contains("delete its DaemonSet"),
        "{}",
        text(&refused.stderr)
    );
    assert!(scratch.read("10-flannel.conflist").contains("culvert-cni"));
    assert!(
        run(&scratch, &["uninstall", "--socket", socket, "--force"])
            .status
            .success()
    );
    assert!(!scratch.read("10-flannel.conflist").contains("culvert-cni"));
}

#[test]
fn a_debug_pod_finds_the_host_where_it_is_mounted() {
    let scratch = Scratch::new("cli-host");
    scratch.put_real("flannel");
    let before = scratch.picture();
    assert!(run(&scratch, &["install"]).status.success());
    let _agent = UnixListener::bind(scratch.root.join("agent.sock")).unwrap();
    // All paths as the host has them.
    let uninstall = |more: &[&str]| {
        #[expect(clippy::disallowed_methods, reason = "the program under test")]
        let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
        command.env_clear().args(["uninstall", "--host-root"]);
        command.arg(&scratch.root).args(more);
        command.args(["--cni-bin-dir", "/bin", "--cni-conf-dir", "/net.d"]);
        command.args(["--socket", "/agent.sock", "--bpffs", "/no-bpffs"]);
        command.output().unwrap()
    };
    let refused = uninstall(&[]);
    assert!(!refused.status.success());
    let said = text(&refused.stderr);
    assert!(said.contains("an agent runs on this node"), "{said}");
    let done = uninstall(&["--force", "--unenrol-pods"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(scratch.picture(), before);
}

#[test]
fn a_kill_at_any_moment_leaves_old_or_new() {
    let scratch = Scratch::new("cli-kill");
    let name = scratch.put_real("bridge-conf");
    let original = scratch.read(&name);
    // Large enough for a kill to hit the copying.
    let programs = ["1", "2"].map(|n| format!("#!{}\n{}", n, n.repeat(8 << 20)));
    let list = "100-crio-bridge.conflist";
    let mut killed = 0;
    for round in 0..60_u64 {
        scratch.plugin(&programs[usize::from(round % 4 < 2)]);
        let verb = if round % 2 == 0 {
            "install"
        } else {
            "uninstall"
        };
        let mut child = culvert(&scratch, &[verb])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(round * 7919 % 30_000));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        let lone = fs::read_to_string(scratch.conf(&name)).ok();
        let wrapped = fs::read_to_string(scratch.conf(list)).ok();
        assert!(
            lone.is_some() || wrapped.is_some(),
            "round {round}: no configuration left"
        );
        assert!(lone.is_none_or(|l| l == original), "round {round}");
        if let Some(wrapped) = wrapped {
            let value: Value = serde_json::from_str(&wrapped).unwrap();
            assert_eq!(value["plugins"][1]["type"], "culvert-cni", "round {round}");
        }
        if let Ok(plugin) = fs::read_to_string(scratch.root.join("bin/culvert-cni")) {
            assert!(programs.contains(&plugin), "round {round}: half a plugin");
        }
    }
    assert!(
        killed > 10,
        "only {killed} of 60 were killed before they were done"
    );
    // What was left lying about goes with the next run.
    assert!(run(&scratch, &["install"]).status.success());
    assert!(run(&scratch, &["uninstall"]).status.success());
    let left: Vec<String> = scratch.picture().into_keys().collect();
    assert_eq!(left, [format!("net.d/{name}")]);
    assert_eq!(scratch.read(&name), original);
}
