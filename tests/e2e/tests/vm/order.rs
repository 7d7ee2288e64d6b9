//! Beside somebody else's translator of service addresses at the cgroup root (Cilium's socket load balancing): below it
//! our programs see the resolver's address first, on every kernel; at the same place only where the kernel knows an
//! order, and elsewhere it is said.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use culvert_e2e::{
    Mesh,
    dns::{Resolver, ask_connected_here, ask_here},
};
use culvert_lab::{Family, Hooks, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};
use serde_json::Value;

const BY_ZTUNNEL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BY_RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The resolver's service: an address that nobody has.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// What the translator's programs are called.
const TRANSLATOR: &str = "somebody_elses";

/// A cgroup of all pods below the lab's, which plays the root.
struct Kubepods(PathBuf);

impl Kubepods {
    fn make(root: &Path) -> Result<Self> {
        let dir = root.join("kubepods");
        std::fs::create_dir(&dir)?;
        std::fs::write(dir.join("cgroup.type"), "threaded")?;
        Ok(Self(dir))
    }

    /// Runs in a pod's namespace and cgroup.
    fn run<T: Send>(&self, pod: &Ns, f: impl FnOnce() -> T + Send) -> Result<T> {
        pod.run(|| {
            let tid = nix::unistd::gettid().to_string();
            std::fs::write(self.0.join("cgroup.threads"), tid)
                .with_context(|| format!("moving a thread into {}", self.0.display()))?;
            Ok(f())
        })
    }
}

struct Stage {
    kubepods: Kubepods,
    _resolver: Resolver,
    mesh: Mesh,
    pod: Ns,
    stranger: Ns,
    backend: Ipv4Addr,
}

fn stage(name: &str) -> Result<Stage> {
    let lab = Lab::new(name)?;
    let outside = lab.outside()?;
    let IpAddr::V4(backend) = outside.ip(Family::V4)? else {
        anyhow::bail!("an address of another family");
    };
    let resolver = Resolver::start(&outside, backend.into(), BY_RESOLVER)?;
    let zds = Zds::start(&lab)?;
    let options = ZtunnelOptions::new()
        .arg("--dns-name")
        .arg(&format!("mesh.test={BY_ZTUNNEL}"))
        .arg("--dns-upstream")
        .arg(&resolver.addr().to_string());
    let ztunnel = Ztunnel::start(&lab, &zds, &options)?;
    let (pod, stranger) = (lab.pod("a")?, lab.pod("b")?);
    Ok(Stage {
        kubepods: Kubepods::make(lab.cgroup())?,
        _resolver: resolver,
        mesh: Mesh { zds, ztunnel, lab },
        pod,
        stranger,
        backend,
    })
}

impl Stage {
    fn translator(&self) -> Result<Hooks> {
        Hooks::translate(self.mesh.lab.cgroup(), SERVICE, self.backend, 53)
    }

    fn enrol(&self) -> Result<()> {
        self.mesh.enrol(&self.pod, &["--dns"])?;
        self.mesh.expect_listeners(&self.pod, 5)
    }

    /// What both kinds of client are told in a pod, and under the service's name, which each checks.
    fn told(&self, pod: &Ns) -> Result<[Ipv4Addr; 2]> {
        let service = SocketAddr::from((SERVICE, 53));
        self.kubepods.run(pod, || {
            Ok([
                ask_here(service, "mesh.test")?,
                ask_connected_here(service, "mesh.test")?,
            ])
        })?
    }

    /// Where the programs are, by their own report.
    fn dns(&self) -> Result<Value> {
        Ok(self.mesh.show(&self.pod)?["dns"].clone())
    }
}

#[test]
fn dns_programs_below_a_translator_at_the_root_see_the_service_first() {
    let stage = stage("vm-order").unwrap();
    // While a pod runs in it: an empty one is not taken for that of pods.
    stage
        .kubepods
        .run(&stage.pod, || stage.enrol())
        .unwrap()
        .unwrap();
    let place = stage.dns().unwrap();
    assert_eq!(place["cgroup"], stage.kubepods.0.to_str().unwrap());
    assert_eq!(place["problems"], serde_json::json!([]));
    // It comes later, as at each start of Cilium's agent, and goes and comes again.
    for _ in 0..2 {
        let _translator = stage.translator().unwrap();
        assert_eq!(stage.told(&stage.pod).unwrap(), [BY_ZTUNNEL; 2]);
        assert_eq!(stage.told(&stage.stranger).unwrap(), [BY_RESOLVER; 2]);
        let place = stage.dns().unwrap();
        assert_eq!(place["ahead"], serde_json::json!([]), "{place}");
    }
    // With ztunnel away it is the translator's matter where the service is.
    let _translator = stage.translator().unwrap();
    stage.mesh.ztunnel.kill().unwrap();
    assert_eq!(stage.told(&stage.pod).unwrap(), [BY_RESOLVER; 2]);
}

#[test]
fn dns_programs_beside_a_translator_are_first_or_say_so() {
    let stage = stage("vm-order-hybrid").unwrap();
    let _translator = stage.translator().unwrap();
    // Nobody is in the pods' cgroup yet, as on hybrid hosts: the programs go to the root.
    stage.enrol().unwrap();
    let place = stage.dns().unwrap();
    assert_eq!(place["cgroup"], stage.mesh.lab.cgroup().to_str().unwrap());
    let ahead = place["ahead"].as_array().unwrap();
    if ahead.is_empty() {
        assert_eq!(stage.told(&stage.pod).unwrap(), [BY_ZTUNNEL; 2]);
        assert_eq!(stage.told(&stage.stranger).unwrap(), [BY_RESOLVER; 2]);
    } else {
        // An older kernel appends: the answer seems to come from the backend, so every hook of it is named.
        let hooks = ["recvmsg4", "getpeername4", "sendmsg4", "connect4"];
        let named: Vec<_> = ahead.iter().map(|hook| hook.as_str().unwrap()).collect();
        assert_eq!(
            named,
            hooks.map(|hook| format!("{hook}: {TRANSLATOR}")).to_vec()
        );
        let shown = stage.mesh.show(&stage.pod).unwrap();
        let notes = shown["notes"].to_string();
        assert!(notes.contains(TRANSLATOR), "{notes}");
    }
}
