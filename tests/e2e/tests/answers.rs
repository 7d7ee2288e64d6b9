//! What a client is told when nobody serves: by a closed port of the application, and by destinations that cannot be
//! reached. What differs from a pod that is not enrolled is written down here, and differs for every proxy that accepts
//! before it has reached the other side.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Family, Ns, Route, Rule, RuleAction, Server, connect, roundtrip};

/// Nobody listens here.
const CLOSED: u16 = 9;
const ROUNDS: usize = 21;
/// "At once", on a machine that has other things to do.
const AT_ONCE: Duration = Duration::from_millis(50);

/// How a connection went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// `connect()` failed with this error number.
    Failed(i32),
    /// Accepted, and ended without a word.
    Ended,
    /// Somebody answered.
    Answered,
}

fn outcome(client: &Ns, to: SocketAddr) -> Result<Outcome> {
    let mut stream = match connect(client, to, LONG) {
        Ok(stream) => stream,
        Err(error) => return Ok(Outcome::Failed(error.raw_os_error().unwrap_or(0))),
    };
    match stream.read(&mut [0; 1]) {
        Ok(0) => Ok(Outcome::Ended),
        Ok(_) => Ok(Outcome::Answered),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(Outcome::Ended),
        Err(e) => Err(e.into()),
    }
}

/// The outcome, the same each time, and how long it took in the middle.
fn measured(client: &Ns, to: SocketAddr) -> Result<(Outcome, Duration)> {
    let first = outcome(client, to)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let next = outcome(client, to)?;
        times.push(started.elapsed());
        anyhow::ensure!(next == first, "{next:?} after {first:?}");
    }
    times.sort();
    Ok((first, *times.get(ROUNDS / 2).unwrap_or(&Duration::MAX)))
}

#[test]
fn a_closed_port_answers_at_once() {
    let (mesh, [a, b]) = Mesh::meshed("closed-port", ["a", "b"]).unwrap();
    mesh.lab
        .attach(
            &a,
            &[
                "--probe-source",
                "none",
                "--ztunnel",
                &mesh.ztunnel.pid().to_string(),
            ],
        )
        .unwrap();
    let outside = mesh.lab.outside().unwrap();
    let refused = Outcome::Failed(libc::ECONNREFUSED);
    for family in Family::BOTH {
        let app = a.at(family, CLOSED).unwrap();
        let loopback = SocketAddr::new(family.loopback(), CLOSED);
        for (client, to, expected) in [
            // ztunnel has accepted before it learns that the application does not.
            (&outside, app, Outcome::Ended),
            (&b, app, Outcome::Ended),
            // Nobody is between the pod and itself.
            (&a, app, refused),
            (&a, loopback, refused),
        ] {
            let what = format!("{} to {to}", client.name());
            let (came, median) = measured(client, to).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            assert_eq!(came, expected, "{what}");
            assert!(median < AT_ONCE, "{what}: {median:?}");
        }
    }
}

fn net(family: Family, number: u8) -> (ipnet::IpNet, SocketAddr) {
    let (net, host): (String, String) = match family {
        Family::V4 => (
            format!("203.0.113.{}/28", number * 16),
            format!("203.0.113.{}", number * 16 + 1),
        ),
        Family::V6 => (
            format!("2001:db8:{number}::/48"),
            format!("2001:db8:{number}::1"),
        ),
    };
    let host: IpAddr = host.parse().unwrap_or(family.loopback());
    let net = net.parse().unwrap_or_else(|_| host.into());
    (net, SocketAddr::new(host, 80))
}

fn unreachable(family: Family, to: ipnet::IpNet) -> Rule {
    Rule {
        fwmark: None,
        to: Some(to),
        pref: Some(500),
        action: RuleAction::Unreachable,
        ..Rule::fwmark(family, 0, 0)
    }
}

#[test]
fn what_the_pods_own_routes_say_is_said_as_before() {
    let mesh = Mesh::new("own-routes").unwrap();
    let lost = mesh.lab.pod("lost").unwrap();
    let barred = mesh.lab.pod("barred").unwrap();
    let ask = || -> Result<Vec<Outcome>> {
        let mut all = Vec::new();
        for family in Family::BOTH {
            all.push(outcome(&lost, net(family, 1).1)?);
            all.push(outcome(&barred, net(family, 2).1)?);
            all.push(outcome(&barred, barred.at(family, CLOSED)?)?);
        }
        Ok(all)
    };
    for family in Family::BOTH {
        let gateway = mesh.lab.node().ip(family).unwrap();
        lost.del_route(&Route::default_via(gateway)).unwrap();
        let rule = unreachable(family, net(family, 2).0);
        barred.add_rule(&rule).unwrap();
    }
    let nowhere = libc::ENETUNREACH;
    let expected = [nowhere, nowhere, libc::ECONNREFUSED].map(Outcome::Failed);
    let expected = [expected, expected].concat();
    // The kernel makes the local route of a new IPv6 address in its own time.
    eventually("without us each has its error", || Ok(ask()? == expected)).unwrap();
    for pod in [&lost, &barred] {
        mesh.enrol(pod, &[]).unwrap();
    }
    assert_eq!(ask().unwrap(), expected);
    for pod in [&lost, &barred] {
        mesh.lab.detach(pod).unwrap();
    }
    assert_eq!(ask().unwrap(), expected);
}

/// The difference: what is found out on the way, ztunnel finds out, after it has accepted. The connection ends.
#[test]
fn what_is_found_out_on_the_way_ends_the_connection() {
    let mesh = Mesh::new("on-the-way").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    for family in Family::BOTH {
        let barred = net(family, 3);
        let rule = unreachable(family, barred.0);
        mesh.lab.node().add_rule(&rule).unwrap();
        let closed = outside.at(family, CLOSED).unwrap();
        for to in [closed, barred.1] {
            let came = outcome(&pod, to).unwrap();
            assert!(matches!(came, Outcome::Failed(_)), "{to}: {came:?}");
        }
        assert_eq!(
            outcome(&pod, closed).unwrap(),
            Outcome::Failed(libc::ECONNREFUSED)
        );
    }
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        for to in [outside.at(family, CLOSED).unwrap(), net(family, 3).1] {
            assert_eq!(outcome(&pod, to).unwrap(), Outcome::Ended, "{to}");
        }
        // And those that can be reached are.
        let server = Server::echo(&outside, outside.at(family, 80).unwrap()).unwrap();
        roundtrip(&connect(&pod, server.addr(), LONG).unwrap(), b"hello").unwrap();
    }
}
