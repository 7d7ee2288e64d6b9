//! A pod that tries to get past ztunnel and one it talks to through HBONE, so that neither the destination's port nor the
//! payload may ever be seen on the node's end of the first pod's interface. Makes no attempt itself.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Capture, Family, Lab, Ns, Server, Zds, Ztunnel, ZtunnelOptions, roundtrip};
use socket2::{Domain, Protocol, Socket, Type};

use crate::Mesh;

/// What nobody on the way may read.
pub const NEEDLE: &[u8] = b"not for anybody on the way";
/// Where `b` serves.
pub const PORT: u16 = 8080;
/// How long a call that may fail or hang is given. What it sends, it sends at once.
pub const MOMENT: Duration = Duration::from_millis(300);

/// Two pods, with an echo server of each family in the second.
pub struct Cage {
    servers: [Server; 2],
    options: ZtunnelOptions,
    /// The mesh, whose ztunnel knows both pods.
    pub mesh: Mesh,
    /// The pod that tries.
    pub a: Ns,
    /// The pod it talks to.
    pub b: Ns,
}

impl Cage {
    /// Nothing is enrolled yet.
    pub fn open(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (a, b) = (lab.pod("a")?, lab.pod("b")?);
        let zds = Zds::start(&lab)?;
        let options = ZtunnelOptions::new().hbone(&a).hbone(&b);
        let ztunnel = Ztunnel::start(&lab, &zds, &options)?;
        let serve = |family| Server::echo(&b, b.at(family, PORT)?);
        let servers = [serve(Family::V4)?, serve(Family::V6)?];
        let mesh = Mesh { zds, ztunnel, lab };
        Ok(Self {
            servers,
            options,
            mesh,
            a,
            b,
        })
    }

    /// Both pods enrolled.
    pub fn shut(name: &str, args: &[&str]) -> Result<Self> {
        let cage = Self::open(name)?;
        cage.enrol(args)?;
        Ok(cage)
    }

    /// Enrols both pods.
    pub fn enrol(&self, args: &[&str]) -> Result<()> {
        self.mesh.enrol(&self.a, args)?;
        self.mesh.enrol(&self.b, args)
    }

    /// A new ztunnel in the place of one that is gone.
    pub fn new_ztunnel(&mut self, args: &[&str]) -> Result<()> {
        for pod in [&self.a, &self.b] {
            self.mesh.zds.del(pod.name())?;
        }
        self.mesh.ztunnel = Ztunnel::start(&self.mesh.lab, &self.mesh.zds, &self.options)?;
        self.enrol(args)
    }

    /// The echo server in `b`.
    pub fn server(&self, family: Family) -> &Server {
        let [v4, v6] = &self.servers;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    /// Watches what leaves `a`.
    pub fn wire(&self) -> Result<Capture> {
        Capture::outside(self.mesh.lab.node(), &self.a)
    }

    /// Says the needle, and makes sure that the server in `b` heard it from `a`'s own address.
    pub fn talk(&self, stream: &TcpStream, family: Family, what: &str) -> Result<()> {
        let answer = roundtrip(stream, NEEDLE).with_context(|| what.to_owned())?;
        ensure!(answer == NEEDLE, "{what}: answered {answer:?}");
        let peers = self.server(family).peers();
        let last = peers
            .last()
            .with_context(|| format!("{what}: nobody came"))?;
        let own = self.a.ip(family)?;
        ensure!(
            last.ip() == own,
            "{what}: came from {last} instead of {own}"
        );
        Ok(())
    }
}

/// Fails if anything was seen that must not be, whatever became of the call.
pub fn nothing_escaped(wire: &Capture, what: &str) -> Result<()> {
    wire.none(|p| p.routing_header || p.is_tcp() && (p.src.port() == PORT || p.dst.port() == PORT))
        .with_context(|| what.to_owned())?;
    ensure!(
        !wire.contains(NEEDLE)?,
        "{what}: the needle is on the wire:\n{}",
        wire.describe()
    );
    Ok(())
}

/// A TCP socket as `socket()` makes it, in the namespace of the calling thread.
pub fn tcp(family: Family) -> io::Result<Socket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
}

/// Connects a socket that is there already, for at most this long.
pub fn connect_socket(socket: &Socket, to: SocketAddr, timeout: Duration) -> io::Result<()> {
    // Blocking: after a non-blocking one that failed, the next call on the same socket only tells of that.
    socket.set_write_timeout(Some(timeout))?;
    socket.connect(&to.into())
}
