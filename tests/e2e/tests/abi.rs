//! Pins of another ABI version: whoever has no agent is refused with the cure, and all is left as it is. The agent takes
//! them over: `agent_abi.rs`.

use culvert_e2e::{Mesh, picture, traffic::Via, version::restamp};
use culvert_lab::{Family, Server};

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
                "start `culvert agent`",
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
