//! What is left in the kernel when pods have come and gone and everything is unloaded: nothing, by the kernel's own word.

use std::time::{Duration, Instant};

use culvert_e2e::{
    Mesh, bpf, eventually, picture,
    traffic::{Via, servers},
};
use culvert_lab::{Lab, Ns};

#[test]
fn after_detach_and_unload_nothing_of_ours_is_left() {
    let mesh = Mesh::new("nothing").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let before = picture::settled(&mesh.lab, &[&pod, &outside]).unwrap();
    mesh.enrol(&pod, &["--exclude-outbound-port", "9"]).unwrap();
    let ids = bpf::map_ids(&mesh.lab).unwrap();
    assert!(ids.len() > 10, "{ids:?}");
    assert!(!bpf::programs_using(&ids).unwrap().is_empty());
    for (_, server) in servers(&outside, 8080).unwrap() {
        assert_eq!(mesh.via(&pod, &pod, &server).unwrap().0, Via::Outbound);
    }
    let path = pod.path().display().to_string();
    let said = mesh
        .lab
        .culvert(&["netns", "detach", "--netns", &path, "--wait", "20"])
        .unwrap();
    let said = said.ok().unwrap().stdout;
    assert!(said.contains("detached"), "{said}");
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    picture::same(
        &before,
        &picture::all(&mesh.lab, &[&pod, &outside]).unwrap(),
    )
    .unwrap();
    // ztunnel's sockets do not keep anything either; the kernel frees programs and maps a moment later.
    eventually("programs are freed", || {
        Ok(bpf::programs_using(&ids)?.is_empty())
    })
    .unwrap();
    eventually("maps are freed", || {
        for id in &ids {
            if bpf::map_exists(*id)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .unwrap();
    // And unloading again finds nothing.
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
}

#[test]
fn five_hundred_pods_come_and_go_and_leave_nothing() {
    const PODS: usize = 500;
    const AT_ONCE: usize = 50;
    let lab = Lab::new("many").unwrap();
    lab.culvert(&["load"]).unwrap().ok().unwrap();
    let ids = bpf::map_ids(&lab).unwrap();
    let clean = (
        lab.pins().unwrap(),
        bpf::keys(&lab).unwrap(),
        bpf::programs_using(&ids).unwrap(),
    );
    let mut gone = 0;
    for round in 0..PODS / AT_ONCE {
        let pods: Vec<Ns> = (0..AT_ONCE)
            .map(|n| {
                let name = format!("p{}", round * AT_ONCE + n);
                lab.pod_builder(&name).no_bridge().build().unwrap()
            })
            .collect();
        let paths: Vec<String> = pods
            .iter()
            .map(|p| p.path().display().to_string())
            .collect();
        let flags = |paths: &[String]| -> Vec<String> {
            paths
                .iter()
                .flat_map(|p| ["--netns".to_owned(), p.clone()])
                .collect()
        };
        let run = |verb: &str, paths: &[String], more: &[&str]| {
            let flags = flags(paths);
            let args: Vec<&str> = ["netns", verb]
                .into_iter()
                .chain(flags.iter().map(String::as_str))
                .chain(more.iter().copied())
                .collect();
            lab.culvert(&args).unwrap().ok().unwrap()
        };
        run(
            "attach",
            &paths,
            &[
                "--exclude-outbound-port",
                "80",
                "--exclude-outbound-cidr",
                "fd00::/8",
                "--exclude-inbound-port",
                "81",
            ],
        );
        assert!(lab.pins().unwrap().len() >= clean.0.len() + AT_ONCE);
        // Every second one is let go, the others die as they are.
        let (live, die): (Vec<_>, Vec<_>) = paths
            .iter()
            .cloned()
            .enumerate()
            .partition(|(n, _)| n % 2 == 0);
        let live: Vec<String> = live.into_iter().map(|(_, p)| p).collect();
        run("detach", &live, &[]);
        gone += die.len();
        for pod in pods {
            lab.delete(pod).unwrap();
        }
    }
    assert_eq!(gone, PODS / 2);
    let started = Instant::now();
    loop {
        // Any command that changes something collects; the kernel takes its time with dead namespaces.
        let nowhere = lab.culvert(&["netns", "detach", "--netns", "/run/netns/none-of-these"]);
        drop(nowhere);
        let now = (
            lab.pins().unwrap(),
            bpf::keys(&lab).unwrap(),
            bpf::programs_using(&ids).unwrap(),
        );
        if now == clean {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "left behind: {} pins, {} programs, entries {:?}",
            now.0.len() - clean.0.len(),
            now.2.len() - clean.2.len(),
            now.1
                .iter()
                .map(|(name, keys)| (name, keys.len()))
                .collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}
