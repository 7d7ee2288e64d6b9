//! Pods and what is around them: who is seen as the client, in which ways two pods of one node may meet, and UDP, which is
//! nobody's business here.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use culvert_e2e::traffic::talk_as;
use culvert_e2e::{LONG, Mesh};
use culvert_lab::{Family, Ns, Server, connect, roundtrip};

const APP: u16 = 8080;

#[test]
fn the_clients_address_is_preserved_in_hbone_and_in_plaintext() {
    let (mesh, [a, b]) = Mesh::meshed("client-address", ["a", "b"]).unwrap();
    let outside = mesh.lab.outside().unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&b, b.at(family, APP).unwrap()).unwrap();
        for client in [&a, &outside] {
            talk_as(client, &server, client.ip(family).unwrap()).unwrap();
        }
        // As well by who listens for both families at once.
        let any = SocketAddr::new(Family::V6.unspecified(), APP + 1);
        let any = Server::builder(&b, any).v6only(false).start().unwrap();
        for client in [&a, &outside] {
            let stream = connect(client, b.at(family, APP + 1).unwrap(), LONG).unwrap();
            roundtrip(&stream, b"hello").unwrap();
            let seen = any.peers().last().unwrap().ip().to_canonical();
            assert_eq!(seen, client.ip(family).unwrap());
        }
    }
}

/// A datagram there and back; who it came from.
fn datagram(client: &Ns, server: &Ns, at: SocketAddr) -> Result<SocketAddr> {
    let listening = server.run(|| UdpSocket::bind(at))?;
    listening.set_read_timeout(Some(LONG))?;
    let any = SocketAddr::new(Family::of(at.ip()).unspecified(), 0);
    let asking = client.run(|| UdpSocket::bind(any).and_then(|s| s.connect(at).map(|()| s)))?;
    asking.set_read_timeout(Some(LONG))?;
    asking.send(b"question")?;
    let mut words = [0; 64];
    let (length, from) = listening.recv_from(&mut words)?;
    ensure!(words.get(..length) == Some(b"question".as_slice()));
    listening.send_to(b"answer", from)?;
    let length = asking.recv(&mut words)?;
    ensure!(words.get(..length) == Some(b"answer".as_slice()));
    Ok(from)
}

#[test]
fn udp_is_left_alone() {
    let (mesh, pod, outside) = Mesh::one_pod("udp").unwrap();
    for family in Family::BOTH {
        // Port 53 as well: nobody asked for DNS capture. And ztunnel's numbers mean TCP ports.
        for port in [53, 15001, 15006, 15008, 9999] {
            for (client, server) in [(&pod, &outside), (&outside, &pod), (&pod, &pod)] {
                let at = server.at(family, port).unwrap();
                let from = datagram(client, server, at)
                    .unwrap_or_else(|e| panic!("{} to {at}: {e:?}", client.name()));
                assert_eq!(from.ip(), client.ip(family).unwrap());
            }
        }
        let loopback = SocketAddr::new(family.loopback(), 9999);
        datagram(&pod, &pod, loopback).unwrap();
    }
    let stats = mesh.ztunnel.pod_stats("a").unwrap();
    for name in ["outbound_accepts", "inbound_accepts", "dns_queries"] {
        assert_eq!(stats[name], 0, "{name}");
    }
}

#[test]
fn two_pods_of_one_node() {
    let lab_mesh = Mesh::meshed("same-node", ["a", "b"]);
    let (mesh, [a, b]) = lab_mesh.unwrap();
    let (c, d) = (mesh.lab.pod("c").unwrap(), mesh.lab.pod("d").unwrap());
    for family in Family::BOTH {
        let at = |pod: &Ns| Server::echo(pod, pod.at(family, APP).unwrap()).unwrap();
        let servers = [&a, &b, &c, &d].map(at);
        let ip = |pod: &Ns| pod.ip(family).unwrap();
        let stats = |pod: &str| mesh.ztunnel.pod_stats(pod).unwrap();
        let grew = |pod: &str, name: &str, before: &serde_json::Value| {
            let (now, then) = (stats(pod)[name].as_u64(), before[name].as_u64());
            now.unwrap() - then.unwrap()
        };
        // Both enrolled.
        let before = (stats("a"), stats("b"));
        talk_as(&a, &servers[1], ip(&a)).unwrap();
        assert_eq!(grew("a", "hbone_out", &before.0), 1);
        assert_eq!(grew("b", "hbone_in", &before.1), 1);
        // The client alone.
        talk_as(&a, &servers[2], ip(&a)).unwrap();
        assert_eq!(grew("a", "passthrough_out", &before.0), 1);
        // The server alone.
        talk_as(&c, &servers[0], ip(&c)).unwrap();
        assert_eq!(grew("a", "inbound_accepts", &before.0), 1);
        // Neither.
        let before = (stats("a"), stats("b"));
        talk_as(&c, &servers[3], ip(&c)).unwrap();
        talk_as(&d, &servers[2], ip(&d)).unwrap();
        assert_eq!((stats("a"), stats("b")), before);
    }
}
