//! Four-tuple collisions: ztunnel delivers to the application from the client's address with a port of its own choice,
//! which the client may be using, or come to use, for another connection to the same application.
//!
//! Client and ztunnel choose from the same small range, and every connection stays open until the last, so that hundreds
//! of the two thousand collide.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{LONG, Mesh};
use culvert_lab::{Family, Ns, Route, connect, roundtrip};
use socket2::{Domain, Protocol, Socket, Type};

const CONNECTIONS: u16 = 2000;
const FIRST_PORT: u16 = 40_000;
const LAST_PORT: u16 = 42_999;
const APP: u16 = 8080;

/// Answers every connection once, keeps it, and answers each a second time.
struct App {
    thread: JoinHandle<Result<Vec<u16>>>,
}

impl App {
    fn start(pod: &Ns, at: SocketAddr, connections: u16) -> Result<Self> {
        let listener = pod.run(|| TcpListener::bind(at))?;
        let thread = std::thread::spawn(move || {
            let (mut open, mut ports) = (Vec::new(), Vec::new());
            for number in 0..connections {
                let (stream, peer) = listener.accept().context("accepting")?;
                ports.push(peer.port());
                stream.set_read_timeout(Some(LONG))?;
                answer(&stream).with_context(|| format!("the app's connection {number}"))?;
                open.push(stream);
            }
            for (number, stream) in open.iter().enumerate() {
                answer(stream).with_context(|| format!("the app's connection {number}, again"))?;
            }
            Ok(ports)
        });
        Ok(Self { thread })
    }

    /// Fails if it did, or if too few ports of deliveries were the client's as well: then nothing was tested.
    fn end(self, clients: &HashSet<u16>) -> Result<()> {
        let ports = match self.thread.join() {
            Ok(ended) => ended?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let collided = ports.iter().filter(|port| clients.contains(port)).count();
        ensure!(
            collided * 4 >= ports.len(),
            "{collided} collisions among {} connections",
            ports.len()
        );
        Ok(())
    }
}

fn answer(mut stream: &TcpStream) -> Result<()> {
    let mut word = [0; 4];
    stream.read_exact(&mut word)?;
    Ok(stream.write_all(&word)?)
}

/// Says something that no other connection says, and wants it back.
fn ask(mut stream: &TcpStream, number: u16, round: u8) -> Result<()> {
    let [high, low] = number.to_be_bytes();
    let word = [round, high, low, 0x55];
    stream.write_all(&word)?;
    let mut back = [0; 4];
    stream.read_exact(&mut back)?;
    ensure!(back == word, "{word:?} came back as {back:?}");
    Ok(())
}

/// Opens them one after another, from ports all over the range, and keeps them all. Returns the ports.
fn open_all(client: &Ns, from: Family, to: SocketAddr, connections: u16) -> Result<HashSet<u16>> {
    let source = client.ip(from)?;
    client.run(|| {
        let (mut open, mut ports) = (Vec::new(), HashSet::new());
        let range = LAST_PORT - FIRST_PORT + 1;
        for number in 0..connections {
            // A step that has no divisor in common with the range visits each port once.
            let step = u32::from(number) * 1013 % u32::from(range);
            let port = FIRST_PORT + u16::try_from(step)?;
            let what = || format!("connection {number} from port {port}");
            let stream = from_port(SocketAddr::new(source, port), to).with_context(what)?;
            ask(&stream, number, 1).with_context(what)?;
            open.push(stream);
            ports.insert(port);
        }
        for (number, stream) in (0..connections).zip(&open) {
            ask(stream, number, 2).with_context(|| format!("connection {number}, again"))?;
        }
        Ok(ports)
    })
}

fn from_port(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    // The next round uses the same ports again.
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.set_write_timeout(Some(LONG))?;
    socket.set_read_timeout(Some(LONG))?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// ztunnel, too, is to choose from the client's range.
fn narrow(pod: &Ns) -> Result<()> {
    let range = format!("{FIRST_PORT} {LAST_PORT}");
    pod.set_sysctl("net/ipv4/ip_local_port_range", &range)
}

fn plaintext(name: &str, family: Family) -> Result<()> {
    let mesh = Mesh::new(name)?;
    let pod = mesh.lab.pod("a")?;
    let outside = mesh.lab.outside()?;
    narrow(&pod)?;
    mesh.enrol(&pod, &["--probe-source", "none"])?;
    let to = pod.at(family, APP)?;
    let app = App::start(&pod, to, CONNECTIONS)?;
    let ports = open_all(&outside, family, to, CONNECTIONS)?;
    app.end(&ports)?;
    ensure!(mesh.stat(&pod, "inbound_accepts")? == u64::from(CONNECTIONS));
    Ok(())
}

#[test]
fn in_plaintext_over_ipv4() {
    plaintext("collide-4", Family::V4).unwrap();
}

#[test]
fn in_plaintext_over_ipv6() {
    plaintext("collide-6", Family::V6).unwrap();
}

fn hbone(name: &str, family: Family) -> Result<()> {
    let (mesh, [a, b]) = Mesh::meshed(name, ["a", "b"])?;
    narrow(&a)?;
    // The client's own ztunnel is not to take a port away that the client wants.
    b.set_sysctl("net/ipv4/ip_local_port_range", "50000 60999")?;
    let to = a.at(family, APP)?;
    let app = App::start(&a, to, CONNECTIONS)?;
    let ports = open_all(&b, family, to, CONNECTIONS)?;
    app.end(&ports)?;
    ensure!(mesh.stat(&a, "hbone_in")? == u64::from(CONNECTIONS));
    ensure!(mesh.stat(&a, "inbound_accepts")? == 0);
    Ok(())
}

#[test]
fn in_hbone_over_ipv4() {
    hbone("collide-hbone-4", Family::V4).unwrap();
}

#[test]
fn in_hbone_over_ipv6() {
    hbone("collide-hbone-6", Family::V6).unwrap();
}

/// Half of the connections to each interface's address.
fn two_interfaces(name: &str, family: Family) -> Result<()> {
    let mesh = Mesh::new(name)?;
    let pod = mesh.lab.pod("a")?;
    let outside = mesh.lab.outside()?;
    let second = second_interface(&mesh, &pod, family, true)?;
    narrow(&pod)?;
    mesh.enrol(&pod, &["--probe-source", "none"])?;
    let half = CONNECTIONS / 2;
    for to in [pod.at(family, APP)?, second] {
        let app = App::start(&pod, to, half)?;
        let ports = open_all(&outside, family, to, half).with_context(|| to.to_string())?;
        app.end(&ports)?;
    }
    ensure!(mesh.stat(&pod, "inbound_accepts")? == u64::from(CONNECTIONS));
    Ok(())
}

/// A second interface with an address, and whether what comes by it is answered by it (a policy rule, as with several
/// networks of one pod) or by the default route.
fn second_interface(mesh: &Mesh, pod: &Ns, family: Family, symmetric: bool) -> Result<SocketAddr> {
    let node = mesh.lab.node();
    let host_end = mesh.lab.add_interface(pod, "net1")?;
    let (here, there): (ipnet::IpNet, ipnet::IpNet) = match family {
        Family::V4 => ("10.99.0.2/24".parse()?, "10.99.0.1/24".parse()?),
        Family::V6 => ("fd99::2/64".parse()?, "fd99::1/64".parse()?),
    };
    pod.add_addr("net1", here)?;
    node.add_addr(&host_end, there)?;
    if symmetric {
        pod.add_route(&Route {
            dev: Some("net1".to_owned()),
            table: 77,
            ..Route::default_via(there.addr())
        })?;
        pod.add_rule(&culvert_lab::Rule {
            from: Some(here.addr().into()),
            fwmark: None,
            pref: Some(100),
            ..culvert_lab::Rule::fwmark(family, 0, 77)
        })?;
    }
    Ok(SocketAddr::new(here.addr(), APP))
}

#[test]
fn in_a_pod_with_two_interfaces_over_ipv4() {
    two_interfaces("collide-two-4", Family::V4).unwrap();
}

#[test]
fn in_a_pod_with_two_interfaces_over_ipv6() {
    two_interfaces("collide-two-6", Family::V6).unwrap();
}

/// What comes by one interface and is answered by another works without us, and so it must with us.
#[test]
fn asymmetric_routes() {
    for family in Family::BOTH {
        let mesh = Mesh::new("asymmetric").unwrap();
        let pod = mesh.lab.pod("a").unwrap();
        let outside = mesh.lab.outside().unwrap();
        let second = second_interface(&mesh, &pod, family, false).unwrap();
        let server = culvert_lab::Server::echo(&pod, second).unwrap();
        let talk = || -> Result<()> {
            roundtrip(&connect(&outside, server.addr(), LONG)?, b"hello")?;
            Ok(())
        };
        talk().unwrap();
        mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
        talk().unwrap_or_else(|e| panic!("{family}: {e:?}"));
    }
}
