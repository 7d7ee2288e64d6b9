//! ZDS towards the stand-in ztunnel, and the stand-in as a process of the lab.

use std::time::{Duration, Instant};

use culvert_lab::{Family, Lab, Zds, Ztunnel, ZtunnelOptions, connect};

const LONG: Duration = Duration::from_secs(10);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LONG, "{what}: not within {LONG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn pods_are_told_in_the_snapshot_and_later() {
    let lab = Lab::new("zds").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    let zds = Zds::start(&lab).unwrap();
    zds.add_pod(&a).unwrap();
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new().hbone(&a)).unwrap();
    let stats = ztunnel.pod_stats("a").unwrap();
    assert_eq!(stats["netns_inode"], a.inode().unwrap());
    assert!(ztunnel.pod_stats("b").is_err());
    zds.add_pod(&b).unwrap();
    for pod in [&a, &b] {
        for family in Family::BOTH {
            connect(lab.node(), pod.at(family, 15008).unwrap(), LONG).unwrap();
        }
    }
    zds.del("a").unwrap();
    eventually("a is gone", || ztunnel.pod_stats("a").is_err());
    zds.del("a").unwrap_err();
    assert_eq!(zds.troubles(), Vec::<String>::new());
}

#[test]
fn ztunnels_come_and_go() {
    let lab = Lab::new("ztunnels").unwrap();
    let pod = lab.pod("a").unwrap();
    let zds = Zds::start(&lab).unwrap();
    zds.add_pod(&pod).unwrap();
    let old = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    let new = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new().drain(0)).unwrap();
    assert_eq!(zds.ztunnels(), [old.pid(), new.pid()]);
    zds.hang_up();
    eventually("both are back", || zds.ztunnels().len() == 2);
    assert_eq!(zds.connected(), 4);
    old.kill().unwrap();
    assert_eq!(zds.ztunnels(), [new.pid()]);
    new.term().unwrap();
    assert!(new.process().wait(LONG).unwrap().success());
    assert_eq!(zds.ztunnels(), [0; 0]);
    zds.del("a").unwrap();
}
