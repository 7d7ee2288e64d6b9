//! Manifests read from real files, edited, broken and mended.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A directory that goes away with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("culvert-manifests-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        let temp = self.0.join(format!(".{name}"));
        fs::write(&temp, text).unwrap();
        fs::rename(temp, self.0.join(name)).unwrap();
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const TWO: &str = "
apiVersion: v1
kind: Namespace
metadata:
  name: shop
  labels: {istio.io/dataplane-mode: ambient}
---
apiVersion: v1
kind: Pod
metadata:
  name: cart
  namespace: shop
  creationTimestamp: null
  annotations: {culvert.dev/netns: /run/netns/cart, unknown: dropped}
spec:
  serviceAccountName: cart
  containers: [{name: app, image: x}]
status:
  podIPs: [{ip: 10.0.0.1}, {ip: '2001:db8::1'}]
";

fn names(manifests: &Manifests) -> Vec<String> {
    let receiver = manifests.subscribe();
    let cluster = receiver.borrow();
    let mut names: Vec<_> = cluster
        .pods
        .values()
        .map(|p| p.reference().to_string())
        .collect();
    names.sort();
    names
}

#[test]
fn several_documents_and_json() {
    let dir = Dir::new();
    dir.write("a.yaml", TWO);
    dir.write(
        "b.json",
        r#"{"kind": "List", "items": [{"kind": "Pod", "metadata": {"name": "j", "uid": "u-1",
            "annotations": {"kubernetes.io/config.hash": "h-1", "culvert.dev/netns": "/x"}},
            "status": {"podIP": "10.0.0.2", "phase": "Succeeded"}}]}"#,
    );
    dir.write("ignored.txt", "not yaml: [");
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    assert_eq!(manifests.problems(), []);
    let receiver = manifests.subscribe();
    let cluster = receiver.borrow();
    assert!(cluster.listed && cluster.opted_in_listed);
    assert_eq!(cluster.namespaces["shop"].labels.len(), 1);
    assert!(
        cluster.namespaces["default"].labels.is_empty(),
        "exists without a manifest"
    );
    let cart = cluster.pods.values().find(|p| p.name == "cart").unwrap();
    assert_eq!(cart.addresses.len(), 2);
    assert_eq!(cart.service_account, "cart");
    assert_eq!(cart.annotations.keys().collect::<Vec<_>>(), [keys::NETNS]);
    assert_eq!(cart.uid.as_str().len(), 36);
    let other = &cluster.pods[&PodUid::from("u-1")];
    assert!(other.is_called(&PodUid::from("h-1")) && other.phase == crate::model::Phase::Succeeded);
}

#[test]
fn a_broken_file_keeps_its_last_good_content_and_is_reported_with_its_line() {
    let dir = Dir::new();
    dir.write("a.yaml", TWO);
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    let before = manifests.subscribe().borrow().pods.clone();
    for (text, line, says) in [
        ("kind: Pod\nmetadata:\n  name: [x\n", 3, ""),
        (
            "kind: Pod\nmetadata: {name: cart}\nspec:\n  hostNetwork: perhaps\n",
            4,
            "",
        ),
        ("kind: Pod\nmetadata: {}\n", 1, "metadata.name"),
        ("metadata: {name: x}\n", 0, "kind: Pod"),
        ("", 0, "empty"),
    ] {
        dir.write("a.yaml", text);
        manifests.read();
        let problems = manifests.problems();
        let [problem] = problems.as_slice() else {
            panic!("{text}: {problems:?}");
        };
        assert_eq!(problem.file, dir.0.join("a.yaml"));
        assert!(problem.line.abs_diff(line) <= 1, "{text}: {problem}");
        assert!(
            problem.what.contains(says) && problem.what.contains("before stays"),
            "{problem}"
        );
        assert_eq!(manifests.subscribe().borrow().pods, before, "{text}");
    }
    dir.write("a.yaml", &TWO.replace("cart", "cart2"));
    manifests.read();
    assert_eq!(manifests.problems(), []);
    assert_eq!(names(&manifests), ["shop/cart2"]);
}

#[test]
fn a_removed_file_removes_its_pods_and_a_removed_directory_does_not() {
    let dir = Dir::new();
    dir.write("a.yaml", TWO);
    dir.write(
        "b.yaml",
        &TWO.replace("cart", "pay").replace("shop", "till"),
    );
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    assert_eq!(names(&manifests), ["shop/cart", "till/pay"]);
    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    manifests.read();
    assert_eq!(names(&manifests), ["till/pay"]);
    fs::remove_dir_all(&dir.0).unwrap();
    manifests.read();
    assert_eq!(names(&manifests), ["till/pay"]);
    assert_eq!(manifests.problems().len(), 1);
}

#[test]
fn what_is_defined_twice_or_lacks_something_is_said() {
    let dir = Dir::new();
    dir.write("a.yaml", TWO);
    dir.write("b.yaml", &TWO.replace("/run/netns/cart", "/elsewhere"));
    dir.write(
        "c.yaml",
        "kind: Deployment\nmetadata: {name: d}\n---\nkind: Pod\nmetadata: {name: bare}\n",
    );
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    let said: Vec<String> = manifests
        .problems()
        .iter()
        .map(ToString::to_string)
        .collect();
    let has = |parts: &[&str]| said.iter().any(|s| parts.iter().all(|p| s.contains(p)));
    assert!(
        has(&["b.yaml", "namespace shop is defined twice"]),
        "{said:#?}"
    );
    assert!(
        has(&["b.yaml", "pod shop/cart is defined twice"]),
        "{said:#?}"
    );
    assert!(has(&["c.yaml:1", "Deployment is left out"]), "{said:#?}");
    assert!(
        has(&["c.yaml:4", "default/bare", "status.podIPs"]),
        "{said:#?}"
    );
    assert!(
        has(&["c.yaml:4", "default/bare", "culvert.dev/netns"]),
        "{said:#?}"
    );
    let cart = manifests.get_pod("shop", "cart").unwrap();
    assert_eq!(cart.annotations[keys::NETNS], "/run/netns/cart");
}

#[test]
fn a_namespace_whose_pods_carry_labels_is_never_said_to_be_out() {
    let dir = Dir::new();
    let labelled =
        "kind: Pod\nmetadata:\n  name: own\n  labels: {istio.io/dataplane-mode: ambient}\n";
    dir.write("a.yaml", labelled);
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    let could = || {
        let receiver = manifests.subscribe();
        let cluster = receiver.borrow();
        let opted_in = cluster.opted_in.get("default").copied().unwrap_or(0);
        let labels = &cluster.namespaces["default"].labels;
        crate::plan::settings::Settings::default().could_be_in("default", labels, opted_in)
    };
    assert!(could());
    dir.write("a.yaml", "kind: Pod\nmetadata: {name: own}\n");
    manifests.read();
    assert!(!could());
}

#[test]
fn redirection_is_remembered_for_pods_that_exist() {
    let dir = Dir::new();
    dir.write("a.yaml", TWO);
    let manifests = Manifests::new(&dir.0);
    manifests.read();
    let pod = manifests.get_pod("shop", "cart").unwrap().reference();
    assert!(manifests.set_redirection(&pod, Some(Redirection::Enabled)));
    assert_eq!(
        manifests.redirections(),
        [(pod.uid.clone(), Redirection::Enabled)].into()
    );
    assert!(manifests.set_redirection(&pod, None));
    assert!(manifests.redirections().is_empty());
    let mut successor = pod.clone();
    successor.uid = "another".into();
    assert!(!manifests.set_redirection(&successor, Some(Redirection::Enabled)));
    assert!(manifests.set_redirection(&pod, Some(Redirection::Pending)));
    dir.write("a.yaml", "# nothing\n");
    manifests.read();
    assert!(manifests.redirections().is_empty(), "gone with its pod");
}

#[tokio::test]
async fn a_changed_label_is_seen_at_once() {
    for single_file in [false, true] {
        let dir = Dir::new();
        dir.write("a.yaml", TWO);
        let path = if single_file {
            dir.0.join("a.yaml")
        } else {
            dir.0.clone()
        };
        let manifests = Manifests::new(path);
        let mut reader = manifests.subscribe();
        let change = async {
            reader.wait_for(|c| c.listed).await.unwrap();
            for mode in ["none", "ambient", "none"] {
                let started = std::time::Instant::now();
                dir.write(
                    "a.yaml",
                    &TWO.replace("mode: ambient", &format!("mode: {mode}")),
                );
                let labelled =
                    |c: &Cluster| c.namespaces["shop"].labels[keys::DATAPLANE_MODE] == mode;
                reader.wait_for(labelled).await.unwrap();
                assert!(started.elapsed() < REREAD / 2, "not by reading again");
            }
        };
        tokio::select! {
            () = manifests.run() => unreachable!("runs for ever"),
            () = change => {}
        }
    }
}

#[tokio::test]
async fn what_is_no_file_or_too_long_is_a_problem_and_holds_up_nobody() {
    let dir = Dir::new();
    dir.write("two.yaml", TWO);
    let fifo = dir.0.join("pipe.yaml");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::create_dir(dir.0.join("dir.json")).unwrap();
    dir.write("long.yaml", &"# as long as that\n".repeat(70_000));
    let manifests = std::sync::Arc::new(Manifests::new(&dir.0));
    let reading = std::sync::Arc::clone(&manifests);
    let read = tokio::task::spawn_blocking(move || reading.read());
    timeout(Duration::from_secs(20), read)
        .await
        .expect("nobody writes into the pipe")
        .unwrap();
    assert_eq!(names(&manifests), ["shop/cart"]);
    let problems = manifests.problems();
    let said = |name: &str| {
        let problem = problems.iter().find(|p| p.file.ends_with(name));
        problem.map(|p| p.what.clone()).unwrap_or_default()
    };
    assert!(
        said("pipe.yaml").contains("no regular file"),
        "{problems:?}"
    );
    assert!(said("dir.json").contains("no regular file"), "{problems:?}");
    assert!(
        said("long.yaml").contains("longer than 1 MiB"),
        "{problems:?}"
    );
    assert_eq!(problems.len(), 3, "{problems:?}");

    let lone = Manifests::new(&fifo);
    lone.read();
    assert!(lone.problems()[0].to_string().contains("no regular file"));
}
