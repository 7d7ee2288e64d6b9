//! Pins of another ABI version: refused with the cure, and left as they are.

use anyhow::{Result, ensure};
use culvert_e2e::{Mesh, bpf, picture, traffic::Via};
use culvert_lab::{Family, Lab, Server};

/// Stamps the pins with another version: one back, as an older build's, or one ahead.
fn restamp(lab: &Lab, step: i32) -> Result<u32> {
    let config = bpf::Map::pinned(&lab.bpffs().join("maps/CONFIG"))?;
    let key = 0_u32.to_ne_bytes();
    let mut value = config.get(&key)?;
    let (version, _) = value.split_at_mut(4);
    let there = u32::from_ne_bytes(version.try_into()?);
    let other = there.saturating_add_signed(step);
    ensure!(other != there, "there is no version {step:+}");
    version.copy_from_slice(&other.to_ne_bytes());
    config.set(&key, &value)?;
    Ok(other)
}

#[test]
fn pins_of_another_version_are_refused_with_the_cure_and_pods_stay_captured() {
    for step in [-1, 1] {
        let mesh = Mesh::new(&format!("abi{}", step + 1)).unwrap();
        let lab = &mesh.lab;
        let pod = lab.pod("a").unwrap();
        let other = lab.pod("b").unwrap();
        let outside = lab.outside().unwrap();
        mesh.enrol(&pod, &[]).unwrap();
        let server = Server::echo(&outside, outside.at(Family::V4, 8080).unwrap()).unwrap();
        let version = restamp(lab, step).unwrap();
        let before = picture::all(lab, &[&pod, &other]).unwrap();
        let (mine, others) = (
            pod.path().display().to_string(),
            other.path().display().to_string(),
        );
        for args in [
            vec!["load"],
            vec!["netns", "attach", "--netns", &others],
            vec!["netns", "attach", "--netns", &mine],
            vec!["netns", "detach", "--netns", &mine],
            vec!["netns", "show", "--netns", &mine],
            vec!["netns", "list"],
            vec!["netns", "watch"],
            vec!["unload"],
        ] {
            let output = lab.culvert(&args).unwrap();
            assert!(!output.status.success(), "{args:?}: {output:?}");
            for word in [
                &format!("ABI version {version}"),
                "run the culvert that made them",
                "culvert unload --force",
            ] {
                assert!(
                    output.stderr.contains(word),
                    "{args:?} does not say {word}: {output:?}"
                );
            }
        }
        picture::same(&before, &picture::all(lab, &[&pod, &other]).unwrap()).unwrap();
        // What runs, runs on: asked of ztunnel, because culvert cannot be asked.
        let accepted = mesh.stat(&pod, "outbound_accepts").unwrap();
        culvert_e2e::traffic::talk(&pod, server.addr()).unwrap();
        assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), accepted + 1);

        // The cure cures.
        lab.culvert(&["unload", "--force"]).unwrap().ok().unwrap();
        lab.attach(&pod, &["--ztunnel", &mesh.ztunnel.pid().to_string()])
            .unwrap();
        mesh.expect_listeners(&pod, 3).unwrap();
        assert_eq!(mesh.via(&pod, &pod, &server).unwrap().0, Via::Outbound);
    }
}
