//! ztunnel gone, late, replaced or doubled: nothing leaves in plaintext, connections wait or are refused as asked, and who
//! is there serves.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, Mesh, eventually,
    traffic::{Via, talk},
};
use culvert_lab::{
    Capture, Connect, Connecting, Family, Ns, Server, Ztunnel, ZtunnelOptions, connect, roundtrip,
};

/// A first retry of a SYN comes after one second: nothing may have happened long before, or well after.
const A_WHILE: Duration = Duration::from_millis(1500);
/// SYN retries back off, so completing may take this much longer than ztunnel itself.
const RETRIES: Duration = Duration::from_secs(30);
/// What "at once" means on a machine that does much else: before a SYN would be sent a second time.
const AT_ONCE: Duration = Duration::from_millis(900);

fn outside_servers(outside: &Ns) -> Result<Vec<(Family, Server)>> {
    Family::BOTH
        .into_iter()
        .map(|family| Ok((family, Server::echo(outside, outside.at(family, 8080)?)?)))
        .collect()
}

/// Nothing of TCP left the pod's interface towards these servers.
fn nothing_left(wire: &Capture, servers: &[(Family, Server)]) -> Result<()> {
    wire.none(|p| p.is_tcp() && servers.iter().any(|(_, s)| p.has_port(s.addr().port())))
}

fn fails_with(result: io::Result<std::net::TcpStream>, errno: i32) -> Result<()> {
    match result {
        Ok(stream) => anyhow::bail!("it connected: {stream:?}"),
        Err(error) => ensure!(
            error.raw_os_error() == Some(errno),
            "not error {errno}: {error}"
        ),
    }
    Ok(())
}

#[test]
fn while_ztunnel_is_away_nothing_leaves_and_a_waiting_connection_completes_when_it_is_back() {
    let mesh = Mesh::new("awayhold").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    // By mark alone: a second ztunnel is another process, and naming it is another test.
    mesh.enrol(&pod, &["--hold", "forever"]).unwrap();
    let servers = outside_servers(&outside).unwrap();
    for (_, server) in &servers {
        talk(&pod, server.addr()).unwrap();
    }
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let seen: Vec<usize> = servers.iter().map(|(_, s)| s.count()).collect();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for (connecting, (family, _)) in waiting.iter().zip(&servers) {
        assert!(
            !connecting.settled(A_WHILE).unwrap(),
            "{family:?}: it does not wait"
        );
    }
    nothing_left(&wire, &servers).unwrap();
    for ((_, server), seen) in servers.iter().zip(seen) {
        assert_eq!(server.count(), seen);
    }
    assert!(mesh.counter(&pod, "no_outbound_listener").unwrap() >= 2);
    let back = again(&mesh, &pod).unwrap();
    for (connecting, (family, server)) in waiting.into_iter().zip(&servers) {
        let stream = connecting
            .wait(RETRIES)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        roundtrip(&stream, b"waited").unwrap();
        assert_eq!(
            server.peers().last().unwrap().ip(),
            pod.ip(*family).unwrap()
        );
    }
    let stats = back.pod_stats(pod.name()).unwrap();
    assert_eq!(stats["outbound_accepts"], 2, "both by way of ztunnel");
}

/// Starts another ztunnel as an agent does that knows it before it listens: the pod is attached with its number, and only
/// then does it get its pods.
fn again(mesh: &Mesh, pod: &Ns) -> Result<Ztunnel> {
    let ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new())?;
    let pid = ztunnel.pid().to_string();
    // Its listeners are there from the snapshot on; attaching fetches what the kernel side did not take for ztunnel's.
    mesh.lab
        .attach(pod, &["--hold", "forever", "--ztunnel", &pid])?;
    Ok(ztunnel)
}

#[test]
fn after_the_grace_new_connections_are_refused_at_once_and_again_served_when_it_is_back() {
    let mesh = Mesh::new("awayrefuse").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let hold = Duration::from_secs(4);
    mesh.lab.attach(&pod, &["--hold", "4"]).unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    let servers = outside_servers(&outside).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    mesh.ztunnel.kill().unwrap();
    let gone = Instant::now();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for connecting in &waiting {
        assert!(!connecting.settled(Duration::from_millis(300)).unwrap());
    }
    std::thread::sleep(hold.saturating_sub(gone.elapsed()) + Duration::from_millis(100));
    for (family, server) in &servers {
        let asked = Instant::now();
        let result = connect(&pod, server.addr(), LONG);
        let took = asked.elapsed();
        fails_with(result, libc::EHOSTUNREACH)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        assert!(took < AT_ONCE, "{family:?}: refused after {took:?}");
    }
    // Bound to a device it cannot be refused that way, but must not get out either.
    for (family, server) in &servers {
        let ifname = pod.ifname().to_owned();
        let bound = Connect::to(server.addr())
            .device(&ifname)
            .timeout(A_WHILE)
            .run(&pod);
        assert!(bound.is_err(), "{family:?}: it connected without ztunnel");
    }
    assert!(mesh.counter(&pod, "refused").unwrap() >= 2);
    nothing_left(&wire, &servers).unwrap();
    for (_, server) in &servers {
        assert_eq!(server.count(), 0);
    }
    // The pod still reaches itself.
    culvert_e2e::traffic::local_delivery_works(&pod).unwrap();
    // Back: refused no longer, and those from before the end of the grace may still complete.
    let _back = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new()).unwrap();
    for (family, server) in &servers {
        eventually("connections are served again", || {
            Ok(talk(&pod, server.addr()).is_ok())
        })
        .with_context(|| format!("{family:?}"))
        .unwrap();
    }
    for connecting in waiting {
        roundtrip(&connecting.wait(RETRIES).unwrap(), b"from before").unwrap();
    }
}

#[test]
fn with_hold_0_connections_are_refused_from_the_first_moment() {
    let mesh = Mesh::new("hold0").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let servers = outside_servers(&outside).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    // Before any ztunnel was there, and after it has gone.
    mesh.lab.attach(&pod, &["--hold", "0"]).unwrap();
    for round in ["not there yet", "gone"] {
        for (family, server) in &servers {
            let asked = Instant::now();
            let result = connect(&pod, server.addr(), LONG);
            fails_with(result, libc::EHOSTUNREACH)
                .with_context(|| format!("{round}, {family:?}"))
                .unwrap();
            assert!(asked.elapsed() < AT_ONCE, "{round}, {family:?}");
        }
        nothing_left(&wire, &servers).unwrap();
        if round == "not there yet" {
            mesh.zds.add_pod(&pod).unwrap();
            mesh.expect_listeners(&pod, 3).unwrap();
            for (_, server) in &servers {
                assert_eq!(mesh.via(&pod, &pod, server).unwrap().0, Via::Outbound);
            }
            mesh.ztunnel.kill().unwrap();
            // What ztunnel itself had sent out is not the pod's.
            wire.clear();
        }
    }
}

#[test]
fn with_hold_forever_connections_wait_however_long_it_was_away() {
    let mesh = Mesh::new("holdforever").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let servers = outside_servers(&outside).unwrap();
    mesh.lab.attach(&pod, &["--hold", "1"]).unwrap();
    // The grace of one second is over ...
    for (family, server) in &servers {
        eventually("connections are refused", || {
            Ok(connect(&pod, server.addr(), Duration::from_millis(100))
                .is_err_and(|e| e.raw_os_error() == Some(libc::EHOSTUNREACH)))
        })
        .with_context(|| format!("{family:?}"))
        .unwrap();
    }
    // ... and for ever is longer.
    mesh.lab.attach(&pod, &["--hold", "forever"]).unwrap();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for connecting in &waiting {
        assert!(!connecting.settled(A_WHILE).unwrap());
    }
    mesh.zds.add_pod(&pod).unwrap();
    for connecting in waiting {
        roundtrip(&connecting.wait(RETRIES).unwrap(), b"at last").unwrap();
    }
}

#[test]
fn inbound_is_refused_at_once_while_ztunnel_is_away() {
    let mesh = Mesh::new("awayinbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "forever", "--probe-source", "none"])
        .unwrap();
    let servers: Vec<(Family, Server)> = Family::BOTH
        .into_iter()
        .map(|family| {
            let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
            assert_eq!(mesh.via(&pod, &outside, &server).unwrap().0, Via::Inbound);
            (family, server)
        })
        .collect();
    mesh.ztunnel.kill().unwrap();
    for (family, server) in &servers {
        let seen = server.count();
        let asked = Instant::now();
        let result = connect(&outside, server.addr(), LONG);
        let took = asked.elapsed();
        fails_with(result, libc::ECONNREFUSED)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        assert!(took < AT_ONCE, "{family:?}: refused after {took:?}");
        assert_eq!(server.count(), seen, "{family:?}: it arrived all the same");
    }
    assert!(mesh.counter(&pod, "no_inbound_listener").unwrap() >= 2);
}

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
    errors: Vec<String>,
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
                            match self.one() {
                                Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                                Err(error) => errors
                                    .lock()
                                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                                    .push(format!("{error:?}")),
                            }
                        }
                    });
                });
            }
            std::thread::sleep(moment);
            let result = meanwhile();
            std::thread::sleep(moment);
            stop.store(true, Ordering::SeqCst);
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
    for (family, far) in outside_servers(&outside).unwrap() {
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
    let servers = outside_servers(&outside).unwrap();
    let own: Vec<Server> = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&pod, pod.at(family, 8081).unwrap()).unwrap())
        .collect();
    // `--hold 0`: a moment without a listener that serves would be an error, not a wait.
    let served = |by: &Ztunnel| {
        let before = by.pod_stats(pod.name()).unwrap();
        for ((family, far), own) in servers.iter().zip(&own) {
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
    for (family, server) in outside_servers(&outside).unwrap() {
        let newer = second(&mesh, &pod).unwrap();
        let load = Load {
            pod: &pod,
            from: &pod,
            server: &server,
        };
        let ((), harvest) = load.during(|| newer.kill()).unwrap();
        // Those it had accepted, or had in its queue, died with it: at most one for each of the four threads.
        assert!(
            harvest.errors.len() <= 4,
            "{family:?}: {:?}",
            harvest.errors
        );
        assert!(
            !harvest
                .errors
                .iter()
                .any(|e| e.contains("EHOSTUNREACH") || e.contains("No route")),
            "{family:?}: {:?}",
            harvest.errors
        );
        talk(&pod, server.addr()).unwrap();
    }
}
