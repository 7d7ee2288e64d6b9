//! One request to the agent: HTTP/1.1 over its unix socket, with a bound on time and on what is read.
//!
//! It trusts nothing it reads: whatever listens there, a call ends in time and in little memory. It does not repeat.

use std::{
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::api::{MAX_BODY, Refusal};

/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Most header lines of an answer.
const MAX_HEADERS: usize = 32;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Nobody listens there.
    #[error("no agent at {}: {cause}", socket.display())]
    Away {
        /// The socket.
        socket: PathBuf,
        /// What connecting said.
        cause: io::Error,
    },
    /// It went away before it had answered.
    #[error("the agent closed the connection without an answer{0}")]
    Lost(String),
    /// It did not answer in time.
    #[error("the agent did not answer in time")]
    Slow,
    /// What it said is not an answer.
    #[error("the agent's answer makes no sense: {0}")]
    Garbage(String),
    /// It said no.
    #[error(transparent)]
    Refused(Refusal),
}

/// What is sent.
#[derive(Debug)]
enum Method {
    Get,
    Post(Vec<u8>),
}

/// Asks for something.
///
/// # Errors
///
/// See [`Failure`].
pub fn get<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    deadline: Instant,
) -> Result<T, Failure> {
    exchange(socket, path, &Method::Get, deadline)
}

/// Hands something over.
///
/// # Errors
///
/// See [`Failure`].
pub fn post<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &impl Serialize,
    deadline: Instant,
) -> Result<T, Failure> {
    let body = serde_json::to_vec(body).map_err(|error| Failure::Garbage(error.to_string()))?;
    exchange(socket, path, &Method::Post(body), deadline)
}

fn exchange<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    method: &Method,
    deadline: Instant,
) -> Result<T, Failure> {
    let mut stream = connect(socket, deadline)?;
    let mut request = match method {
        Method::Get => format!("GET {path} HTTP/1.1\r\n"),
        Method::Post(body) => format!(
            "POST {path} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n",
            body.len()
        ),
    }
    .into_bytes();
    request.extend_from_slice(b"host: culvert\r\nconnection: close\r\n\r\n");
    if let Method::Post(body) = method {
        request.extend_from_slice(body);
    }
    send(&mut stream, &request, deadline)?;
    let answer = receive(&mut stream, deadline)?;
    judge(&answer)
}

fn connect(path: &Path, deadline: Instant) -> Result<Socket, Failure> {
    let away = |cause| Failure::Away {
        socket: path.to_owned(),
        cause,
    };
    let address = SockAddr::unix(path).map_err(away)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(away)?;
    // Connecting waits while the listener's queue is full.
    socket
        .set_write_timeout(Some(remaining(deadline)?))
        .map_err(away)?;
    match socket.connect(&address) {
        Ok(()) => Ok(socket),
        Err(error) if is_timeout(&error) => Err(Failure::Slow),
        Err(error) => Err(away(error)),
    }
}

fn send(stream: &mut Socket, mut bytes: &[u8], deadline: Instant) -> Result<(), Failure> {
    while !bytes.is_empty() {
        let sent = stream
            .set_write_timeout(Some(remaining(deadline)?))
            .and_then(|()| stream.write(bytes));
        match sent {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(&error)),
        }
    }
    Ok(())
}

/// Reads until the answer is whole, the peer closes, or it is too long.
fn receive(stream: &mut Socket, deadline: Instant) -> Result<Vec<u8>, Failure> {
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream
            .set_read_timeout(Some(remaining(deadline)?))
            .and_then(|()| stream.read(&mut chunk));
        match read {
            Ok(0) if answer.is_empty() => return Err(Failure::Lost(String::new())),
            Ok(0) => return Ok(answer),
            Ok(read) => answer.extend_from_slice(chunk.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broken(&error)),
        }
        if answer.len() > MAX_HEAD + MAX_BODY {
            return Err(Failure::Garbage("it does not end".into()));
        }
        if let Some(head) = Head::parse(&answer)?
            && head
                .length
                .is_some_and(|length| answer.len() - head.size >= length)
        {
            return Ok(answer);
        }
    }
}

/// The head of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Head {
    status: u16,
    /// Bytes of the head itself.
    size: usize,
    /// Bytes of the body, when it says.
    length: Option<usize>,
}

impl Head {
    /// None while it is not whole.
    fn parse(answer: &[u8]) -> Result<Option<Self>, Failure> {
        let garbage = |what: &str| Failure::Garbage(what.to_owned());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let size = match response.parse(answer) {
            Ok(httparse::Status::Complete(size)) => size,
            Ok(httparse::Status::Partial) if answer.len() <= MAX_HEAD => return Ok(None),
            Ok(httparse::Status::Partial) => return Err(garbage("its head does not end")),
            Err(error) => return Err(garbage(&format!("it is not HTTP: {error}"))),
        };
        let status = response.code.ok_or_else(|| garbage("it has no status"))?;
        let mut length = None;
        for header in response.headers {
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(garbage("it is in pieces, which our agent never does"));
            }
            if header.name.eq_ignore_ascii_case("content-length") {
                let stated = std::str::from_utf8(header.value)
                    .ok()
                    .and_then(|text| text.trim().parse().ok())
                    .filter(|stated| *stated <= MAX_BODY)
                    .ok_or_else(|| garbage("its length is none"))?;
                if length.replace(stated).is_some_and(|other| other != stated) {
                    return Err(garbage("it has two lengths"));
                }
            }
        }
        Ok(Some(Self {
            status,
            size,
            length,
        }))
    }
}

/// What a whole answer says.
fn judge<T: DeserializeOwned>(answer: &[u8]) -> Result<T, Failure> {
    let cut_off = || Failure::Lost(" to the end".into());
    let head = Head::parse(answer)?.ok_or_else(cut_off)?;
    let body = answer.get(head.size..).unwrap_or_default();
    let body = match head.length {
        Some(length) => body.get(..length).ok_or_else(cut_off)?,
        None => body,
    };
    if head.status == 200 {
        return serde_json::from_slice(body).map_err(|error| Failure::Garbage(error.to_string()));
    }
    match serde_json::from_slice(body) {
        Ok(refusal) => Err(Failure::Refused(refusal)),
        Err(_) => Err(Failure::Garbage(format!(
            "status {} and no reason",
            head.status
        ))),
    }
}

fn remaining(deadline: Instant) -> Result<Duration, Failure> {
    deadline
        .checked_duration_since(Instant::now())
        // The kernel takes a time-out of nothing for none at all.
        .filter(|left| *left >= Duration::from_millis(1))
        .ok_or(Failure::Slow)
}

fn broken(error: &io::Error) -> Failure {
    if is_timeout(error) {
        Failure::Slow
    } else {
        Failure::Lost(format!(" ({error})"))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
