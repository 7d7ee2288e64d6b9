//! One ztunnel replaced by another, and two at once: who is there serves, and no connection is lost that could be kept.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, Mesh,
    traffic::{servers, talk},
};
use culvert_lab::{Family, Ns, Server, Stop, Ztunnel, ZtunnelOptions, connect, roundtrip};

/// SYN retries back off, so completing may take this much longer than ztunnel itself.
const RETRIES: Duration = Duration::from_secs(30);
/// What "at once" means on a machine that does much else: before a SYN would be sent a second time.
const AT_ONCE: Duration = Duration::from_millis(900);

/// Connects and talks without pause from several threads, and keeps the errors.
struct Load<'a> {
    pod: &'a Ns,
    from: &'a Ns,
    server: &'a Server,
}

/// What came of it.
#[derive(Debug, Default)]
struct Harvest {
    done: usize,
    /// When each failed one was begun, and how it ended.
    errors: Vec<(Instant, String)>,
}

impl Load<'_> {
    /// Runs `meanwhile` under load, with a quarter of a second of load before and after.
    fn during<T>(&self, meanwhile: impl FnOnce() -> Result<T>) -> Result<(T, Harvest)> {
        let stop = AtomicBool::new(false);
        let done = AtomicUsize::new(0);
        let errors = Mutex::new(Vec::new());
        let moment = Duration::from_millis(250);
        let result = std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    // One namespace thread for all of them: each connection then costs no thread of its own.
                    self.from.run(|| {
                        while !stop.load(Ordering::SeqCst) {
                            let begun = Instant::now();
                            match self.one() {
                                Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                                Err(error) => errors
                                    .lock()
                                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                                    .push((begun, format!("{error:?}"))),
                            }
                        }
                    });
                });
            }
            let _at_the_end = Stop::at_the_end(&stop);
            std::thread::sleep(moment);
            let result = meanwhile();
            std::thread::sleep(moment);
            result
        });
        let errors = errors
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let done = done.load(Ordering::SeqCst);
        ensure!(
            done > 0,
            "{}: no connection at all: {errors:?}",
            self.pod.name()
        );
        Ok((result?, Harvest { done, errors }))
    }

    fn one(&self) -> Result<()> {
        let to = self.server.addr();
        let stream = std::net::TcpStream::connect_timeout(&to, RETRIES).context("connecting")?;
        stream.set_read_timeout(Some(RETRIES))?;
        roundtrip(&stream, b"one of many").context("talking")?;
        Ok(())
    }
}

/// A second ztunnel that gets its pods while the first still serves.
fn second(mesh: &Mesh, pod: &Ns) -> Result<Ztunnel> {
    let before = mesh.show(pod)?["listeners"].as_array().map_or(0, Vec::len);
    let ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new())?;
    mesh.expect_listeners(pod, before + 3)?;
    Ok(ztunnel)
}

#[test]
fn a_ztunnel_replaced_by_a_second_one_under_load_loses_no_connection() {
    let mesh = Mesh::new("handoff").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab.attach(&pod, &["--probe-source", "none"]).unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    for (family, far) in servers(&outside, 8080).unwrap() {
        let own = Server::echo(&pod, pod.at(family, 8081).unwrap()).unwrap();
        for (from, server) in [(&pod, &far), (&outside, &own)] {
            let first = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new()).unwrap();
            let held = connect(from, server.addr(), LONG).unwrap();
            roundtrip(&held, b"before").unwrap();
            let load = Load {
                pod: &pod,
                from,
                server,
            };
            let (next, harvest) = load
                .during(|| {
                    let next = second(&mesh, &pod)?;
                    first.term()?;
                    // It drains: what it carries goes on, and what is new is the next one's.
                    roundtrip(&held, b"while it drains").context("a connection it carries")?;
                    drop(held);
                    first.process().wait(Duration::from_secs(20))?;
                    Ok(next)
                })
                .unwrap();
            assert!(
                harvest.errors.is_empty(),
                "{family:?}: {} of {} lost: {:?}",
                harvest.errors.len(),
                harvest.done + harvest.errors.len(),
                harvest.errors.first()
            );
            talk(from, server.addr()).unwrap();
            drop(next);
        }
    }
}

#[test]
fn of_two_ztunnels_either_may_die_and_the_other_serves_at_once() {
    let mesh = Mesh::new("two").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab
        .attach(&pod, &["--probe-source", "none", "--hold", "0"])
        .unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    let far_servers = servers(&outside, 8080).unwrap();
    let own: Vec<Server> = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&pod, pod.at(family, 8081).unwrap()).unwrap())
        .collect();
    // `--hold 0`: a moment without a listener that serves would be an error, not a wait.
    let served = |by: &Ztunnel| {
        let before = by.pod_stats(pod.name()).unwrap();
        for ((family, far), own) in far_servers.iter().zip(&own) {
            for (from, server) in [(&pod, far), (&outside, own)] {
                let asked = Instant::now();
                talk(from, server.addr())
                    .with_context(|| format!("{family:?} from {}", from.name()))
                    .unwrap();
                assert!(asked.elapsed() < AT_ONCE, "{family:?}");
            }
        }
        let after = by.pod_stats(pod.name()).unwrap();
        for name in ["outbound_accepts", "inbound_accepts"] {
            let grown = after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
            assert_eq!(grown, 2, "{name} of ztunnel {}", by.pid());
        }
    };
    served(&mesh.ztunnel);
    // The newer serves; it dies; the older is back in charge at once.
    let newer = second(&mesh, &pod).unwrap();
    served(&newer);
    newer.kill().unwrap();
    served(&mesh.ztunnel);
    // The older dies; the newer goes on.
    let newer = second(&mesh, &pod).unwrap();
    served(&newer);
    mesh.ztunnel.kill().unwrap();
    served(&newer);
    // Many hand-offs: the slots are used again.
    let mut last = newer;
    for _ in 0..6 {
        let next = second(&mesh, &pod).unwrap();
        last.kill().unwrap();
        served(&next);
        last = next;
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}

#[test]
fn a_ztunnel_killed_under_load_is_not_missed_while_another_listens() {
    let mesh = Mesh::new("killload").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab.attach(&pod, &["--hold", "0"]).unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    for (family, server) in servers(&outside, 8080).unwrap() {
        let newer = second(&mesh, &pod).unwrap();
        let load = Load {
            pod: &pod,
            from: &pod,
            server: &server,
        };
        let (gone, harvest) = load
            .during(|| newer.kill().map(|()| Instant::now()))
            .unwrap();
        // What it had accepted, or was about to, died with it and is told so at once: reset or ended, never left to hang and
        // never refused as if no ztunnel were there. Whatever is begun later is the other's.
        for (begun, error) in &harvest.errors {
            let told = ["reset by peer", "failed to fill", "refused", "Broken pipe"];
            assert!(
                *begun < gone && told.iter().any(|word| error.contains(word)),
                "{family:?}: {error}, begun {:?} after it was gone",
                begun.checked_duration_since(gone)
            );
        }
        talk(&pod, server.addr()).unwrap();
    }
}
