//! `kill -9` at every step of attach, detach and load: nothing is broken or let out in between, and the same command again
//! finishes what was begun.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use culvert_e2e::{
    Mesh,
    killing::{End, run_until},
    picture,
    traffic::{Via, talk},
};
use culvert_lab::{Connect, Family, Ns, Server, roundtrip};

/// More steps than any of the commands takes.
const MANY: usize = 1000;
/// How long a connection is given that may be waiting for ztunnel.
const SHORT: Duration = Duration::from_millis(60);

/// A pod outside the mesh beside a ztunnel that already listens in it, and servers for it to talk to.
struct Scene {
    servers: Vec<Server>,
    /// In the pod itself, on loopback and on its own addresses.
    home: Vec<Server>,
    pod: Ns,
    mesh: Mesh,
    plain: Vec<String>,
}

impl Scene {
    fn new(name: &str) -> Result<Self> {
        let mesh = Mesh::new(name)?;
        let pod = mesh.lab.pod("a")?;
        let outside = mesh.lab.outside()?;
        let servers = Family::BOTH
            .into_iter()
            .map(|family| Server::echo(&outside, outside.at(family, 8080)?))
            .collect::<Result<_>>()?;
        let mut home = Vec::new();
        for family in Family::BOTH {
            home.push(Server::echo(&pod, SocketAddr::new(family.loopback(), 0))?);
            home.push(Server::echo(&pod, pod.at(family, 0)?)?);
        }
        mesh.zds.add_pod(&pod)?;
        mesh.lab.culvert(&["load"])?.ok()?;
        // What a first attach makes and leaves for the next one is part of the picture.
        let plain = picture::settled(&mesh.lab, &[&pod])?;
        Ok(Self {
            servers,
            home,
            pod,
            mesh,
            plain,
        })
    }

    fn netns(&self) -> String {
        self.pod.path().display().to_string()
    }

    fn attach_args(&self) -> Vec<String> {
        let (netns, pid) = (self.netns(), self.mesh.ztunnel.pid().to_string());
        let args = [
            "netns",
            "attach",
            "--netns",
            &netns,
            "--ztunnel",
            &pid,
            "--hold",
            "forever",
        ];
        args.map(str::to_owned).to_vec()
    }

    fn attach(&self) -> Result<()> {
        let args = self.attach_args();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.mesh.lab.culvert(&args)?.ok()?;
        Ok(())
    }

    /// Lets the pod go and waits for what is left of closed connections.
    fn detach(&self) -> Result<()> {
        let netns = self.netns();
        let args = ["netns", "detach", "--netns", &netns, "--wait", "10"];
        let output = self.mesh.lab.culvert(&args)?.ok()?;
        ensure!(
            !output.stdout.contains("draining"),
            "connections that have ended hold the rules: {}",
            output.stdout
        );
        Ok(())
    }

    /// Runs culvert and kills it at that step.
    fn killed_at(&self, step: usize, args: &[&str]) -> Result<End> {
        run_until(
            self.mesh.lab.node(),
            self.mesh.lab.culvert_command(args)?,
            step,
        )
    }

    /// Whatever was half done: local delivery works, and what leaves is plain as before or captured.
    fn sound(&self) -> Result<()> {
        for server in &self.home {
            talk(&self.pod, server.addr()).context("local delivery")?;
        }
        for server in &self.servers {
            self.plain_or_captured(server.addr(), server)?;
        }
        Ok(())
    }

    fn plain_or_captured(&self, to: SocketAddr, server: &Server) -> Result<()> {
        let seen = server.count();
        let connecting = Connect::to(to)
            .start(&self.pod)
            .with_context(|| format!("connecting to {to}"))?;
        if !connecting.settled(SHORT)? {
            // Captured with no listener registered: it waits, and must not have arrived.
            ensure!(
                server.count() == seen,
                "a connection to {to} that does not get through arrived"
            );
            let enrolled = self.mesh.show(&self.pod)?["state"] == "enrolled";
            if enrolled {
                return Ok(());
            }
            // A loaded machine may just be slow.
        }
        let stream = connecting
            .wait(culvert_e2e::LONG)
            .with_context(|| format!("connecting to {to}"))?;
        roundtrip(&stream, b"half done").with_context(|| format!("talking to {to}"))?;
        Ok(())
    }

    fn captured(&self) -> Result<()> {
        let show = self.mesh.show(&self.pod)?;
        ensure!(show["whole"] == true, "not whole: {show}");
        self.all_go(Via::Outbound)
    }

    fn all_go(&self, via: Via) -> Result<()> {
        for server in &self.servers {
            let (went, _) = self.mesh.via(&self.pod, &self.pod, server)?;
            ensure!(went == via, "to {} by {went:?}", server.addr());
        }
        Ok(())
    }

    /// Everything is as before the pod was touched.
    fn untouched(&self) -> Result<()> {
        let now = picture::all(&self.mesh.lab, &[&self.pod])?;
        picture::same(&self.plain, &now)?;
        self.all_go(Via::Nothing)
    }
}

/// Kills at one step after the other until the command gets through; returns how many steps there were.
fn at_every_step(what: &str, mut one: impl FnMut(usize) -> Result<End>) -> Result<usize> {
    let started = Instant::now();
    for step in 1..MANY {
        match one(step).with_context(|| format!("{what} killed at step {step}"))? {
            End::Killed(_) => {}
            End::Ended { steps, code: 0 } => {
                println!("{what}: {steps} steps in {:?}", started.elapsed());
                return Ok(steps);
            }
            End::Ended { code, .. } => bail!("{what} failed by itself: exit code {code}"),
        }
    }
    bail!("{what} takes more than {MANY} steps")
}

#[test]
fn an_attach_killed_at_any_step_leaves_nothing_broken_and_is_completed_by_the_next() {
    let scene = Scene::new("killattach").unwrap();
    let args = scene.attach_args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let steps = at_every_step("attach", |step| {
        let end = scene.killed_at(step, &args)?;
        scene.sound()?;
        scene.attach().context("attaching again")?;
        scene.captured()?;
        scene.detach()?;
        scene.untouched()?;
        Ok(end)
    })
    .unwrap();
    assert!(steps > 10, "an attach of {steps} steps: were they counted?");
}

#[test]
fn an_attach_killed_at_any_step_is_undone_by_a_detach() {
    let scene = Scene::new("killundo").unwrap();
    let args = scene.attach_args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    at_every_step("attach, then detach", |step| {
        let end = scene.killed_at(step, &args)?;
        scene.detach()?;
        scene.untouched()?;
        Ok(end)
    })
    .unwrap();
}

#[test]
fn a_detach_killed_at_any_step_leaves_nothing_broken_and_is_completed_by_the_next() {
    let scene = Scene::new("killdetach").unwrap();
    let netns = scene.netns();
    let steps = at_every_step("detach", |step| {
        scene.attach()?;
        let end = scene.killed_at(step, &["netns", "detach", "--netns", &netns])?;
        scene.sound()?;
        scene.detach().context("detaching again")?;
        scene.untouched()?;
        Ok(end)
    })
    .unwrap();
    assert!(steps > 5, "a detach of {steps} steps: were they counted?");
}

#[test]
fn a_detach_killed_at_any_step_can_be_followed_by_an_attach() {
    let scene = Scene::new("killagain").unwrap();
    let netns = scene.netns();
    at_every_step("detach, then attach", |step| {
        scene.attach()?;
        let end = scene.killed_at(step, &["netns", "detach", "--netns", &netns])?;
        scene.attach().context("attaching after all")?;
        scene.captured()?;
        Ok(end)
    })
    .unwrap();
    scene.detach().unwrap();
    scene.untouched().unwrap();
}

#[test]
fn a_first_load_killed_at_any_step_is_completed_by_the_next() {
    let scene = Scene::new("killload").unwrap();
    scene.mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    let empty = picture::all(&scene.mesh.lab, &[&scene.pod]).unwrap();
    let mut turn = 0;
    let steps = at_every_step("load", |step| {
        let end = scene.killed_at(step, &["load"])?;
        // The pod is nobody's yet, so its traffic is plain whatever was loaded.
        turn += 1;
        if turn % 8 == 0 {
            scene.all_go(Via::Nothing)?;
            scene.attach().context("attaching, which loads")?;
            scene.captured()?;
            scene.detach()?;
        } else {
            let again = scene.mesh.lab.culvert(&["load"])?;
            again.ok().context("loading again")?;
        }
        picture::same(&scene.plain, &picture::all(&scene.mesh.lab, &[&scene.pod])?)?;
        scene.mesh.lab.culvert(&["unload"])?.ok()?;
        picture::same(&empty, &picture::all(&scene.mesh.lab, &[&scene.pod])?)?;
        Ok(end)
    })
    .unwrap();
    assert!(steps > 20, "a load of {steps} steps: were they counted?");
}

/// A pin is what holds a program: between the old one's end and the new one's there must be no step.
#[test]
fn a_load_that_moves_the_programs_keeps_every_pin_wherever_it_is_killed() {
    let scene = Scene::new("killmove").unwrap();
    let lab = &scene.mesh.lab;
    lab.attach(&scene.pod, &["--dns"]).unwrap();
    let links = || -> Result<Vec<String>> {
        let entries = std::fs::read_dir(lab.bpffs().join("links"))?;
        let mut names = entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let all = links().unwrap();
    assert_eq!(all.len(), 11, "{all:?}");
    let other = lab.cgroup().join("other");
    std::fs::create_dir(&other).unwrap();
    let there = other.display().to_string();
    let steps = at_every_step("move", |step| {
        let end = scene.killed_at(step, &["--dns-cgroup", &there, "load"])?;
        let left = links()?;
        ensure!(left == all, "{left:?}");
        lab.culvert(&["load"])?.ok().context("moving back")?;
        Ok(end)
    })
    .unwrap();
    assert!(steps > 20, "a move of {steps} steps: were they counted?");
    std::fs::remove_dir(&other).unwrap();
}

#[test]
fn an_unload_killed_at_any_step_is_completed_by_the_next() {
    let scene = Scene::new("killunload").unwrap();
    scene.mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    let empty = picture::all(&scene.mesh.lab, &[&scene.pod]).unwrap();
    at_every_step("unload", |step| {
        scene.mesh.lab.culvert(&["load"])?.ok()?;
        let end = scene.killed_at(step, &["unload"])?;
        let again = scene.mesh.lab.culvert(&["unload"])?;
        again.ok().context("unloading again")?;
        picture::same(&empty, &picture::all(&scene.mesh.lab, &[&scene.pod])?)?;
        Ok(end)
    })
    .unwrap();
}
