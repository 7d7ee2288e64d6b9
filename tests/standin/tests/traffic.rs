//! Traffic through the stand-in without anything that steers: its parts are called as its listeners would call them, and HBONE
//! is spoken to it directly. With something that steers, the end-to-end tests go on from here. Needs root.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share fails as loudly as a test"
)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use culvert_lab::{Capture, Connect, Family, Lab, Ns, Route, Rule, Zds, Ztunnel, ZtunnelOptions};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use ztunnel_standin::config::{Config, DnsListen};
use ztunnel_standin::dns::Dns;
use ztunnel_standin::hbone::client::{HboneError, handshake, request};
use ztunnel_standin::identity::{Ca, Credentials};
use ztunnel_standin::messages::WorkloadInfo;
use ztunnel_standin::netns::Netns;
use ztunnel_standin::pod::{Pod, Workload};
use ztunnel_standin::workloads::Workloads;
use ztunnel_standin::{outbound, sockets};

const SOON: Duration = Duration::from_secs(5);
/// Not ztunnel's and not Culvert's: routes what carries it back into the pod.
const TURN_ROUND: u32 = 0x999;
const PORT: u16 = 8080;

/// Two pods, a ztunnel as a process that serves `server`, and an app there whose answers stay in the pod.
struct Scene {
    lab: Lab,
    zds: Zds,
    ztunnel: Ztunnel,
    client: Ns,
    server: Ns,
}

impl Scene {
    fn new(name: &str) -> Self {
        let lab = Lab::new(name).unwrap();
        let (client, server) = (lab.pod("client").unwrap(), lab.pod("server").unwrap());
        let zds = Zds::start(&lab).unwrap();
        zds.add_pod(&server).unwrap();
        let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
        for ns in [&client, &server] {
            for family in Family::BOTH {
                ns.add_rule(&Rule::fwmark(family, TURN_ROUND, 100)).unwrap();
                let all = ipnet::IpNet::new(family.unspecified(), 0).unwrap();
                ns.add_route(&Route {
                    table: 100,
                    local: true,
                    ..Route::dev(all, "lo")
                })
                .unwrap();
            }
        }
        Self {
            lab,
            zds,
            ztunnel,
            client,
            server,
        }
    }

    /// An app to which a proxy delivers: its answers to the client's address must stay in the pod.
    fn delivered_app(&self, family: Family) -> App {
        App::start(
            &self.server,
            self.server.at(family, PORT).unwrap(),
            Some(TURN_ROUND),
        )
    }

    /// What the client pod would get when it is added.
    fn credentials(&self) -> Credentials {
        Ca::load(&self.lab.scratch().join("ca"))
            .unwrap()
            .issue(&info(&self.client))
            .unwrap()
    }

    /// HBONE from the client pod to the server pod's proxy, for one tunnel to `to`.
    async fn tunnel(&self, peer: &str, to: SocketAddr) -> Result<TcpStream, HboneError> {
        let proxy = SocketAddr::new(to.ip(), 15008);
        let stream = self
            .client
            .run(|| std::net::TcpStream::connect(proxy))
            .unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        let (sender, connection) =
            handshake(stream, proxy, &self.credentials(), &peer.parse().unwrap()).await?;
        tokio::spawn(connection);
        let tunnel = request(sender, proxy, to).await?;
        // A plain connection whose far end the tunnel carries.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let far = listener.accept().await.unwrap().0;
        tokio::spawn(async move { tunnel.carry(far, &Default::default()).await });
        Ok(near)
    }

    fn count(&self, counter: &str) -> u64 {
        self.ztunnel.pod_stats("server").unwrap()[counter]
            .as_u64()
            .unwrap()
    }
}

/// Sends everything back and remembers who came.
struct App {
    addr: SocketAddr,
    peers: Arc<Mutex<Vec<IpAddr>>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl App {
    fn start(ns: &Ns, addr: SocketAddr, mark: Option<u32>) -> Self {
        let listener = ns.run(|| {
            let socket =
                Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.set_mark(mark.unwrap_or_default()).unwrap();
            socket.bind(&addr.into()).unwrap();
            socket.listen(16).unwrap();
            socket
        });
        let listener = TcpListener::from_std(listener.into()).unwrap();
        let peers = Arc::new(Mutex::new(Vec::new()));
        let seen = peers.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (mut stream, peer) = listener.accept().await.unwrap();
                seen.lock().unwrap().push(peer.ip());
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    // A client may also leave without a word.
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        Self {
            addr,
            peers,
            accepting,
        }
    }

    fn peers(&self) -> Vec<IpAddr> {
        self.peers.lock().unwrap().clone()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn info(ns: &Ns) -> WorkloadInfo {
    // As the lab's ZDS server names its pods.
    WorkloadInfo {
        name: ns.name().into(),
        namespace: "default".into(),
        service_account: ns.name().into(),
    }
}

async fn echo(stream: &mut TcpStream, words: &[u8]) {
    stream.write_all(words).await.unwrap();
    let mut back = vec![0; words.len()];
    tokio::time::timeout(SOON, stream.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(back, words);
}

#[tokio::test(flavor = "multi_thread")]
async fn hbone_delivers_from_the_clients_address_and_shows_nothing_on_the_wire() {
    let scene = Scene::new("standin-hbone");
    for family in Family::BOTH {
        let wire = Capture::outside(scene.lab.node(), &scene.server).unwrap();
        let app = scene.delivered_app(family);
        let mut stream = scene
            .tunnel(&Zds::identity(&scene.server), app.addr)
            .await
            .unwrap();
        echo(&mut stream, b"the plain secret").await;
        assert_eq!(app.peers(), [scene.client.ip(family).unwrap()]);

        // A half-close arrives as one, and the answer still comes back.
        stream.shutdown().await.unwrap();
        assert_eq!(
            tokio::time::timeout(SOON, stream.read(&mut [0]))
                .await
                .unwrap()
                .unwrap(),
            0
        );

        assert!(
            wire.any(|packet| packet.has_port(15008)).unwrap(),
            "the capture sees the tunnel"
        );
        assert!(!wire.contains(b"plain secret").unwrap());
        assert!(!wire.any(|packet| packet.has_port(PORT)).unwrap());
    }
    assert_eq!(
        (scene.count("hbone_accepts"), scene.count("hbone_in")),
        (2, 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hbone_carries_bulk_both_ways() {
    let scene = Scene::new("standin-bulk");
    let app = scene.delivered_app(Family::V4);
    let stream = scene
        .tunnel(&Zds::identity(&scene.server), app.addr)
        .await
        .unwrap();
    // More than all windows and buffers on the way hold together.
    let data: Vec<u8> = (0..64 * 1024 * 1024_u32)
        .map(|i| i.to_le_bytes()[i as usize % 4])
        .collect();
    let (mut read, mut write) = stream.into_split();
    let sent = data.clone();
    let sender = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), read.read_to_end(&mut back))
        .await
        .unwrap()
        .unwrap();
    sender.await.unwrap();
    assert!(
        back == data,
        "{} bytes came back of {}",
        back.len(),
        data.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hbone_refuses_what_is_not_the_pods_own_and_says_when_the_app_does_not_answer() {
    let scene = Scene::new("standin-refuse");
    let server = scene.server.v4().unwrap();
    let identity = Zds::identity(&scene.server);
    let refused = |result: Result<TcpStream, HboneError>| match result {
        Err(HboneError::Refused(status)) => status.as_u16(),
        other => panic!("{other:?}"),
    };
    let own_port = scene.tunnel(&identity, (server, 15001).into()).await;
    assert_eq!(refused(own_port), 403);

    // From the pod itself, because a closed port answers nobody else without steering.
    let inside = Scene {
        client: scene.server.clone(),
        ..scene
    };
    let closed = inside.tunnel(&identity, (server, 81).into()).await;
    assert_eq!(refused(closed), 503);
    assert_eq!(
        (inside.count("refused"), inside.count("connect_failures")),
        (1, 1)
    );

    let wrong = inside
        .tunnel(
            "spiffe://cluster.local/ns/default/sa/other",
            (server, PORT).into(),
        )
        .await;
    assert!(matches!(wrong, Err(HboneError::Tls(..))), "{wrong:?}");
    assert_eq!(inside.count("hbone_in"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_tunnels_finish_and_a_second_one_does_not() {
    let scene = Scene::new("standin-drain");
    let app = scene.delivered_app(Family::V4);
    let identity = Zds::identity(&scene.server);
    let mut stream = scene.tunnel(&identity, app.addr).await.unwrap();
    echo(&mut stream, b"before").await;
    scene.ztunnel.term().unwrap();
    let proxy = scene.server.at(Family::V4, 15008).unwrap();
    let refused = || {
        scene
            .client
            .run(|| std::net::TcpStream::connect(proxy))
            .is_err()
    };
    while !refused() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    echo(&mut stream, b"while draining").await;
    drop(stream);
    assert!(scene.ztunnel.process().wait(SOON).unwrap().success());

    let second = Ztunnel::start(&scene.lab, &scene.zds, &ZtunnelOptions::new().drain(60)).unwrap();
    let mut stream = scene.tunnel(&identity, app.addr).await.unwrap();
    echo(&mut stream, b"again").await;
    second.term().unwrap();
    while !refused() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        second.process().status().is_none(),
        "it waits for the tunnel"
    );
    second.term().unwrap();
    assert!(second.process().wait(SOON).unwrap().success());
    let end = tokio::time::timeout(SOON, stream.read(&mut [0]))
        .await
        .unwrap();
    assert!(matches!(end, Ok(0) | Err(_)));
}

/// Accepts connections to an address that is not the pod's, as a listener to which they are steered would.
fn steered_listener(ns: &Ns, addr: SocketAddr) -> std::net::TcpListener {
    let socket = ns.run(|| {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).unwrap();
        if addr.is_ipv4() {
            socket.set_ip_transparent_v4(true)
        } else {
            socket.set_ip_transparent_v6(true)
        }
        .unwrap();
        // Earlier connections to this address may linger.
        socket.set_reuse_address(true).unwrap();
        socket.bind(&addr.into()).unwrap();
        socket.listen(16).unwrap();
        socket
    });
    socket.into()
}

fn pod(scene: &Scene, workloads: Workloads) -> Arc<Pod> {
    let ca = Ca::load(&scene.lab.scratch().join("ca")).unwrap();
    let config = Config {
        ca,
        workloads,
        dns: Dns::default(),
        dns_listen: DnsListen::Both,
        drain: SOON,
    };
    let netns = Netns::new(scene.client.fd().try_clone_to_owned().unwrap()).unwrap();
    let workload = Workload {
        uid: "client".into(),
        info: info(&scene.client),
    };
    Pod::start(Arc::new(config), workload, netns).unwrap()
}

/// A connection from the client pod to the app, served by `pod` as if it had been steered to 15001.
fn through_outbound(scene: &Scene, pod: &Arc<Pod>, to: SocketAddr) -> std::net::TcpStream {
    let listener = steered_listener(&scene.client, to);
    let own = scene.client.at(Family::of(to.ip()), 0).unwrap();
    let stream = Connect::to(to)
        .from(own)
        .mark(TURN_ROUND)
        .run(&scene.client)
        .unwrap();
    let (accepted, client) = listener.accept().unwrap();
    accepted.set_nonblocking(true).unwrap();
    tokio::spawn(outbound::serve(
        pod.clone(),
        TcpStream::from_std(accepted).unwrap(),
        client,
    ));
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn outbound_reads_the_destination_from_the_socket_and_passes_through_or_tunnels() {
    let scene = Scene::new("standin-outbound");
    for family in Family::BOTH {
        let client = scene.client.ip(family).unwrap();
        let peer = format!(
            "{}={}",
            scene.server.ip(family).unwrap(),
            Zds::identity(&scene.server)
        );
        // Whom no proxy delivers to answers its client by the usual way.
        let plain = App::start(
            &scene.server,
            scene.server.at(family, PORT + 1).unwrap(),
            None,
        );
        let delivered = scene.delivered_app(family);
        for (app, peers, expected) in [
            (&plain, vec![], (0, 3)),
            (&delivered, vec![peer.parse().unwrap()], (3, 0)),
        ] {
            let pod = pod(&scene, Workloads::new(peers, None).unwrap());
            for _ in 0..3 {
                let mut stream = through_outbound(&scene, &pod, app.addr);
                stream.set_read_timeout(Some(SOON)).unwrap();
                stream.write_all(b"carried").unwrap();
                let mut back = [0; 7];
                stream.read_exact(&mut back).unwrap();
                assert_eq!(&back, b"carried");
            }
            let counted = pod.counters.snapshot();
            assert_eq!(
                (counted.hbone_out, counted.passthrough_out),
                expected,
                "{family:?}"
            );
            assert_eq!(counted.bytes, 3 * 2 * 7);
            assert_eq!(app.peers(), [client; 3]);
            pod.cut();
        }
    }
    // Three tunnels, one connection, in each family.
    assert_eq!(
        (scene.count("hbone_accepts"), scene.count("hbone_in")),
        (2, 6)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn outbound_closes_at_once_what_cannot_be_reached() {
    let scene = Scene::new("standin-unreachable");
    let pod = pod(&scene, Workloads::default());
    for (count, family) in Family::BOTH.into_iter().enumerate() {
        let mut stream = through_outbound(&scene, &pod, scene.server.at(family, 81).unwrap());
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert_eq!(pod.counters.connect_failures.get(), count as u64 + 1);
    }
}

#[tokio::test]
async fn listeners_carry_the_mark_and_are_transparent_and_shared() {
    let lab = Lab::new("standin-sockets").unwrap();
    let ns = lab.pod("pod").unwrap();
    for family in Family::BOTH {
        for ip in [family.unspecified(), family.loopback()] {
            let addr = SocketAddr::new(ip, 15001);
            let listener = ns.run(|| sockets::listen(addr)).unwrap();
            let socket = socket2::SockRef::from(&listener);
            assert_eq!(socket.mark().unwrap(), 0x539);
            assert!(socket.reuse_port().unwrap() && socket.ip_transparent_v4().unwrap());
            assert!(family == Family::V4 || socket.ip_transparent_v6().unwrap());
            drop(ns.run(|| sockets::listen(addr)).unwrap());
        }
    }
}
