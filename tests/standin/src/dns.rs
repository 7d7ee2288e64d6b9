//! DNS inside a pod, on 15053: a few names answered here, everything else passed on unread.
//!
//! Owns both listeners' conversations. It must not resolve anything itself: caching, search domains and truncation are the
//! resolver's business.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use crate::pod::Pod;
use crate::sockets::{self, Source};

/// How long the resolver may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// An idle TCP client is let go after this.
const IDLE: Duration = Duration::from_secs(30);
const TTL_SECONDS: u32 = 30;

/// `NAME=IP`, from the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameArg(Name, IpAddr);

impl FromStr for NameArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (name, ip) = text
            .split_once('=')
            .context("expected NAME=IP, for instance web.shop=10.0.0.2")?;
        let mut name =
            Name::from_utf8(name).with_context(|| format!("{name} is not a DNS name"))?;
        name.set_fqdn(true);
        let ip = ip
            .parse()
            .with_context(|| format!("{ip} is not an IP address"))?;
        Ok(Self(name.to_lowercase(), ip))
    }
}

/// What is known about names.
#[derive(Clone, Debug, Default)]
pub struct Dns {
    names: HashMap<Name, Vec<IpAddr>>,
    upstream: Option<SocketAddr>,
}

impl Dns {
    /// Names answered here, and the resolver that is asked for all others.
    #[must_use]
    pub fn new(args: Vec<NameArg>, upstream: Option<SocketAddr>) -> Self {
        let mut names: HashMap<Name, Vec<IpAddr>> = HashMap::new();
        for NameArg(name, ip) in args {
            names.entry(name).or_default().push(ip);
        }
        Self { names, upstream }
    }

    /// The answer to a query about one of our names; `None` says that it is for the resolver.
    fn answer(&self, query: &Message) -> Option<Message> {
        let [question] = query.queries.as_slice() else {
            return None;
        };
        let ips = self.names.get(&question.name.to_lowercase())?;
        let mut answer = response_to(query, ResponseCode::NoError);
        answer.metadata.authoritative = true;
        answer.metadata.recursion_available = true;
        let records = ips.iter().filter_map(|ip| match (ip, question.query_type) {
            (IpAddr::V4(ip), RecordType::A) => Some(RData::A((*ip).into())),
            (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA((*ip).into())),
            _ => None,
        });
        answer.answers = records
            .map(|data| Record::from_rdata(question.name.clone(), TTL_SECONDS, data))
            .collect();
        Some(answer)
    }
}

fn response_to(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    answer.metadata = Metadata::response_from_request(&query.metadata);
    answer.metadata.response_code = code;
    answer.queries.clone_from(&query.queries);
    answer.edns = query.edns.as_ref().map(|_| Edns::new());
    answer
}

/// Serves datagrams until the pod drains, and then those that are queued: they would be lost with the socket.
pub async fn serve_udp(pod: Arc<Pod>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let received = tokio::select! {
            biased;
            received = socket.recv_from(&mut buffer) => received,
            () = pod.draining() => return,
        };
        let Ok((n, client)) = received else { continue };
        pod.counters.dns_queries.one();
        let (query, socket, pod) = (buffer[..n].to_vec(), socket.clone(), pod.clone());
        pod.clone().spawn(async move {
            if let Some(answer) = resolve(&pod, &query, Via::Udp).await {
                // A client that is gone asks again, or does not care.
                let _ = socket.send_to(&answer, client).await;
            }
        });
    }
}

/// Serves one TCP client, query after query.
pub async fn serve_tcp(pod: Arc<Pod>, mut stream: TcpStream, client: SocketAddr) {
    let served: io::Result<()> = async {
        loop {
            let query = tokio::select! {
                // A drain waits for the answer in hand and for no further question.
                () = pod.draining() => return Ok(()),
                query = tokio::time::timeout(IDLE, read_message(&mut stream)) => query,
            };
            // Idle for too long, or the client has hung up.
            let Ok(Ok(query)) = query else {
                return Ok(());
            };
            pod.counters.dns_queries.one();
            match resolve(&pod, &query, Via::Tcp).await {
                Some(answer) => write_message(&mut stream, &answer).await?,
                None => return Ok(()),
            }
        }
    }
    .await;
    if let Err(error) = served {
        tracing::debug!(pod = %pod.name(), %client, %error, "DNS: TCP client ended");
    }
}

#[derive(Clone, Copy)]
enum Via {
    Udp,
    Tcp,
}

/// The answer to send; none for what is not a query at all.
async fn resolve(pod: &Pod, query: &[u8], via: Via) -> Option<Vec<u8>> {
    let dns = &pod.config.dns;
    let parsed = Message::from_vec(query).ok()?;
    if let Some(answer) = dns.answer(&parsed) {
        return answer.to_vec().ok();
    }
    let asked = match dns.upstream {
        Some(upstream) => forward(pod, query, upstream, via).await,
        None => Err(io::Error::new(io::ErrorKind::NotFound, "no --dns-upstream")),
    };
    match asked {
        Ok(answer) => Some(answer),
        Err(error) => {
            tracing::info!(pod = %pod.name(), queries = ?parsed.queries, %error, "DNS: no answer from the resolver");
            response_to(&parsed, ResponseCode::ServFail).to_vec().ok()
        }
    }
}

async fn forward(pod: &Pod, query: &[u8], upstream: SocketAddr, via: Via) -> io::Result<Vec<u8>> {
    let ask = async {
        match via {
            Via::Udp => {
                let socket = sockets::udp_to(&pod.netns, upstream)?;
                socket.send(query).await?;
                let mut answer = vec![0; usize::from(u16::MAX)];
                let n = socket.recv(&mut answer).await?;
                answer.truncate(n);
                Ok(answer)
            }
            Via::Tcp => {
                let mut stream = sockets::connect(&pod.netns, Source::Any, upstream).await?;
                write_message(&mut stream, query).await?;
                read_message(&mut stream).await
            }
        }
    };
    tokio::time::timeout(PATIENCE, ask).await?
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length =
        u16::try_from(message.len()).map_err(|_| io::Error::other("a DNS message over 64 KiB"))?;
    // One write: a length that travels alone confuses some resolvers.
    stream
        .write_all(&[&length.to_be_bytes(), message].concat())
        .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;

    fn dns() -> Dns {
        let args = [
            "web.shop=10.0.0.2",
            "web.shop=fd00::2",
            "old.shop.=10.0.0.9",
        ];
        Dns::new(args.iter().map(|a| a.parse().unwrap()).collect(), None)
    }

    fn ask(name: &str, kind: RecordType) -> Option<Message> {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_utf8(name).unwrap(), kind));
        // Through the wire format, as a client would send it.
        let answer = dns().answer(&Message::from_vec(&query.to_vec().unwrap()).unwrap())?;
        assert_eq!(answer.metadata.id, query.metadata.id);
        Some(Message::from_vec(&answer.to_vec().unwrap()).unwrap())
    }

    fn data(answer: &Message) -> Vec<String> {
        answer
            .answers
            .iter()
            .map(|record| record.data.to_string())
            .collect()
    }

    #[test]
    fn known_names_are_answered_by_family_whatever_their_case() {
        assert_eq!(
            data(&ask("web.shop.", RecordType::A).unwrap()),
            ["10.0.0.2"]
        );
        assert_eq!(
            data(&ask("WEB.Shop.", RecordType::AAAA).unwrap()),
            ["fd00::2"]
        );
        assert_eq!(
            data(&ask("old.shop.", RecordType::A).unwrap()),
            ["10.0.0.9"]
        );
    }

    #[test]
    fn a_known_name_without_such_a_record_is_empty_and_no_error() {
        let answer = ask("old.shop.", RecordType::AAAA).unwrap();
        assert!(answer.answers.is_empty());
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }

    #[test]
    fn other_names_are_for_the_resolver() {
        assert!(ask("web.shop.example.", RecordType::A).is_none());
        assert!(ask("shop.", RecordType::A).is_none());
    }

    #[test]
    fn bad_arguments() {
        for bad in ["web", "web=", "web=x", "a..b=10.0.0.1"] {
            assert!(bad.parse::<NameArg>().is_err(), "{bad}");
        }
    }
}
