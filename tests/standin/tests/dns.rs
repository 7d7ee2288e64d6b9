//! DNS in a pod, asked on the listeners themselves. Needs root.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share fails as loudly as a test"
)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use culvert_lab::{Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

const SOON: Duration = Duration::from_secs(5);

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_utf8(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

fn listener(family: Family) -> SocketAddr {
    SocketAddr::new(family.loopback(), 15053)
}

fn over_udp(pod: &Ns, family: Family, name: &str) -> Message {
    let socket = pod
        .run(|| UdpSocket::bind(SocketAddr::new(family.loopback(), 0)))
        .unwrap();
    socket.connect(listener(family)).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.send(&query(name)).unwrap();
    let mut answer = [0; 1500];
    let n = socket.recv(&mut answer).unwrap();
    Message::from_vec(&answer[..n]).unwrap()
}

fn say(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length, message].concat()).unwrap();
}

fn hear(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).unwrap();
    message
}

/// All names on one connection.
fn over_tcp(pod: &Ns, family: Family, names: &[&str]) -> Vec<Message> {
    let mut stream = pod.run(|| TcpStream::connect(listener(family))).unwrap();
    let mut ask = |name: &&str| {
        say(&mut stream, &query(name));
        Message::from_vec(&hear(&mut stream)).unwrap()
    };
    names.iter().map(&mut ask).collect()
}

fn addresses(message: &Message) -> Vec<String> {
    message
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect()
}

#[test]
fn known_names_are_answered_and_others_asked_of_the_resolver_as_the_pod() {
    let lab = Lab::new("standin-dns").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let (pod, outside) = (lab.pod("pod").unwrap(), lab.outside().unwrap());
    zds.add_pod(&pod).unwrap();
    let resolver = outside.at(Family::V4, 53).unwrap();
    let options = [
        "--dns-name",
        "web.shop=10.1.2.3",
        "--dns-upstream",
        &resolver.to_string(),
    ]
    .iter()
    .fold(ZtunnelOptions::new(), |options, arg| options.arg(arg));
    let ztunnel = Ztunnel::start(&lab, &zds, &options).unwrap();

    // Nobody resolves yet: what is answered is answered here.
    for family in Family::BOTH {
        assert_eq!(
            addresses(&over_udp(&pod, family, "web.shop.")),
            ["10.1.2.3"]
        );
        let answers = over_tcp(&pod, family, &["web.shop.", "WEB.SHOP."]);
        assert!(
            answers
                .iter()
                .all(|answer| addresses(answer) == ["10.1.2.3"])
        );
    }
    let (udp, tcp) = outside.run(|| (UdpSocket::bind(resolver), TcpListener::bind(resolver)));
    let (udp, tcp) = (udp.unwrap(), tcp.unwrap());
    let refusal = |query: &[u8]| {
        let mut answer = Message::from_vec(query).unwrap().into_response();
        answer.metadata.response_code = ResponseCode::NXDomain;
        answer.to_vec().unwrap()
    };
    std::thread::scope(|scope| {
        let resolving = scope.spawn(|| {
            let mut query = [0; 1500];
            let (n, udp_client) = udp.recv_from(&mut query).unwrap();
            udp.send_to(&refusal(&query[..n]), udp_client).unwrap();
            let (mut stream, tcp_client) = tcp.accept().unwrap();
            let query = hear(&mut stream);
            say(&mut stream, &refusal(&query));
            [udp_client.ip(), tcp_client.ip()]
        });
        let answer = over_udp(&pod, Family::V4, "else.where.");
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        let answers = over_tcp(&pod, Family::V6, &["else.where."]);
        assert_eq!(answers[0].metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(resolving.join().unwrap(), [pod.ip(Family::V4).unwrap(); 2]);
    });
    assert_eq!(ztunnel.pod_stats("pod").unwrap()["dns_queries"], 8);
}

#[test]
fn without_a_resolver_other_names_fail_at_once() {
    let lab = Lab::new("standin-servfail").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let pod = lab.pod("pod").unwrap();
    zds.add_pod(&pod).unwrap();
    let _ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    let answer = over_udp(&pod, Family::V6, "else.where.");
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries.len(), 1);
}
