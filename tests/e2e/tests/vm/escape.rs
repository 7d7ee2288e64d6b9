//! Sockets that would get past ztunnel: bound to a device, or with a mark they must not have.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, TcpStream};
use std::os::fd::AsFd as _;

use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Capture, Connect, Creds, Family, Server, connect, roundtrip, sockopt};
use socket2::Socket;

const SO_BINDTOIFINDEX: i32 = 62;

/// Binds a socket to the pod's interface: by name or by index.
fn bind_device(socket: &Socket, ifname: &str, index: Option<u32>) -> io::Result<()> {
    match index {
        None => socket.bind_device(Some(ifname.as_bytes())),
        Some(index) => sockopt::set_int(
            socket.as_fd(),
            libc::SOL_SOCKET,
            SO_BINDTOIFINDEX,
            index.cast_signed(),
        ),
    }
}

#[test]
fn device_bound_sockets_are_captured_before_and_after_connect() {
    let (mesh, [a, b]) = Mesh::meshed("vm-device", ["a", "b"]).unwrap();
    let index = a.ifindex(a.ifname()).unwrap();
    for family in Family::BOTH {
        let wire = Capture::outside(mesh.lab.node(), &a).unwrap();
        let server = Server::echo(&b, b.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&a, "outbound_accepts").unwrap();
        let mut made = 0;
        for creds in [Creds::Root, Creds::Nobody] {
            for by in [None, Some(index)] {
                let bind = |socket: &Socket| bind_device(socket, a.ifname(), by);
                let early = Connect::to(server.addr())
                    .creds(creds)
                    .before(bind)
                    .run(&a)
                    .unwrap();
                assert_eq!(roundtrip(&early, b"before").unwrap(), b"before");

                let late = Connect::to(server.addr()).creds(creds).run(&a).unwrap();
                assert_eq!(roundtrip(&late, b"first").unwrap(), b"first");
                let late = Socket::from(late);
                a.run_as(creds, || bind(&late)).unwrap();
                let late = TcpStream::from(late);
                assert_eq!(roundtrip(&late, b"second").unwrap(), b"second");
                made += 2;
            }
        }
        assert_eq!(
            mesh.stat(&a, "outbound_accepts").unwrap(),
            before + made,
            "{family}"
        );
        wire.none(|packet| packet.has_port(8080)).unwrap();
    }
}

#[test]
fn device_bound_by_its_scope_is_captured() {
    let mesh = Mesh::new("vm-scope").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let index = pod.ifindex(pod.ifname()).unwrap();
    let neighbour: Ipv6Addr = "fe80::77".parse().unwrap();
    let to = SocketAddrV6::new(neighbour, 8080, 0, index);
    let stream = connect(&pod, to.into(), LONG).unwrap();
    eventually("ztunnel accepted it", || {
        Ok(mesh.stat(&pod, "outbound_accepts")? == 1)
    })
    .unwrap();
    let local = stream.local_addr().unwrap().port();
    wire.none(|packet| packet.has_port(local)).unwrap();
}

#[test]
fn device_bound_later_than_enrolment_with_an_interface_added() {
    let mesh = Mesh::new("vm-added").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let _watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    let far = mesh.lab.add_interface(&pod, "net1").unwrap();
    let route = format!("dev #{} ", pod.ifindex("net1").unwrap());
    eventually("the new interface has its turn-round", || {
        let shown = mesh.show(&pod)?;
        Ok(shown["whole"] == true && shown["programmed"].to_string().contains(&route))
    })
    .unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let wire = Capture::start(mesh.lab.node(), &far).unwrap();
        let before = mesh.stat(&pod, "outbound_accepts").unwrap();
        let stream = Connect::to(server.addr()).device("net1").run(&pod).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
        assert_eq!(
            mesh.stat(&pod, "outbound_accepts").unwrap(),
            before + 1,
            "{family}"
        );
        wire.none(culvert_lab::Packet::is_tcp).unwrap();
    }
}

#[test]
fn impostor_with_cap_net_raw_cannot_take_a_mark() {
    let mesh = Mesh::new("vm-impostor").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        for mark in [0x539, 0x111, 0x112, 0x113] {
            let before = mesh.stat(&pod, "outbound_accepts").unwrap();
            let refused = |socket: &Socket| match socket.set_mark(mark) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
                other => Err(io::Error::other(format!("mark {mark:#x}: {other:?}"))),
            };
            let stream = Connect::to(server.addr())
                .creds(Creds::NetRawOnly)
                .before(refused)
                .run(&pod)
                .unwrap();
            let socket = Socket::from(stream);
            pod.run_as(Creds::NetRawOnly, || refused(&socket)).unwrap();
            assert_eq!(roundtrip(&socket.into(), b"hello").unwrap(), b"hello");
            assert_eq!(
                mesh.stat(&pod, "outbound_accepts").unwrap(),
                before + 1,
                "{family}"
            );
        }
        // A mark for ends of its own is the app's to set, and changes nothing for us.
        let stream = Connect::to(server.addr())
            .creds(Creds::NetRawOnly)
            .mark(0x7000)
            .run(&pod)
            .unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 10);
    assert_eq!(mesh.counter(&pod, "impostor").unwrap(), 16);
}
