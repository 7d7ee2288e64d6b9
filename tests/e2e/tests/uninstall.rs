//! Uninstalling on a node whose pods are enrolled: they stay captured unless they are let go by name.

use std::fs;

use anyhow::{Context as _, Result};
use culvert_e2e::{
    LONG, Mesh, picture,
    traffic::{Via, servers},
};
use culvert_lab::{CulvertOutput, Lab, connect, roundtrip};

const CONF: &str =
    "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}\n";

/// `culvert install` or `uninstall` for directories of this lab.
fn culvert(lab: &Lab, verb: &str, args: &[&str]) -> Result<CulvertOutput> {
    let dir = |name: &str| -> Result<String> {
        let path = lab.scratch().join(name);
        fs::create_dir_all(&path)?;
        Ok(path.to_str().context("UTF-8")?.to_owned())
    };
    let (bin, conf) = (dir("bin")?, dir("net.d")?);
    let mut all = vec![verb, "--cni-bin-dir", &bin, "--cni-conf-dir", &conf];
    let plugin = culvert_lab::plugin_binary()?;
    if verb == "install" {
        all.extend(["--plugin-binary", plugin.to_str().context("UTF-8")?]);
    }
    all.extend(args);
    lab.culvert(&all)
}

#[test]
fn pods_stay_captured_until_they_are_let_go_by_name() {
    let mesh = Mesh::new("uninstall").unwrap();
    let (a, b) = (mesh.lab.pod("a").unwrap(), mesh.lab.pod("b").unwrap());
    let outside = mesh.lab.outside().unwrap();
    let before = picture::settled(&mesh.lab, &[&a, &b]).unwrap();
    mesh.enrol(&a, &[]).unwrap();
    mesh.enrol(&b, &[]).unwrap();
    let far = servers(&outside, 8080).unwrap();
    fs::create_dir_all(mesh.lab.scratch().join("net.d")).unwrap();
    let conf = mesh.lab.scratch().join("net.d/10-a.conflist");
    fs::write(&conf, CONF).unwrap();
    culvert(&mesh.lab, "install", &[]).unwrap().ok().unwrap();
    assert!(fs::read_to_string(&conf).unwrap().contains("culvert-cni"));

    culvert(&mesh.lab, "uninstall", &[]).unwrap().ok().unwrap();
    assert_eq!(fs::read_to_string(&conf).unwrap(), CONF);
    for (family, server) in &far {
        let via = mesh.via(&a, &a, server).unwrap().0;
        assert_eq!(via, Via::Outbound, "{family:?}: nothing ends mTLS silently");
    }

    // A connection that is open keeps its pod's rules, and that is said.
    let open = connect(&a, far[0].1.addr(), LONG).unwrap();
    roundtrip(&open, b"before").unwrap();
    let refused = culvert(&mesh.lab, "uninstall", &["--unenrol-pods", "--wait", "0"]).unwrap();
    assert!(!refused.status.success());
    assert!(
        refused.stderr.contains("1 pods still have connections"),
        "{}",
        refused.stderr
    );
    roundtrip(&open, b"after").unwrap();
    for (family, server) in &far {
        let via = mesh.via(&a, &a, server).unwrap().0;
        assert_eq!(via, Via::Nothing, "{family:?}");
    }
    drop(open);
    // As from a pod that has the host's root mounted: every path is looked for below it, pins too.
    let host = mesh.lab.scratch().join("host");
    std::os::unix::fs::symlink("/", &host).unwrap();
    let root = ["--host-root", host.to_str().unwrap()];
    let all = ["--unenrol-pods", "--wait", "20", root[0], root[1]];
    culvert(&mesh.lab, "uninstall", &all).unwrap().ok().unwrap();
    assert_eq!(mesh.lab.pins().unwrap(), Vec::<std::path::PathBuf>::new());
    drop(mesh.ztunnel);
    picture::same(&before, &picture::all(&mesh.lab, &[&a, &b]).unwrap()).unwrap();
}
