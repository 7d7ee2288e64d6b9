//! Interfaces and addresses of a namespace, changed over netlink. Routes and rules are in `routing`.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::Ns;

/// Create it, and fail if it is there.
const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

pub(crate) fn family_of(addr: IpAddr) -> AddressFamily {
    if addr.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

impl Ns {
    /// The index of an interface.
    pub fn ifindex(&self, name: &str) -> Result<u32> {
        Ok(self.link(name)?.header.index)
    }

    /// The hardware address of an interface.
    pub fn mac(&self, name: &str) -> Result<Vec<u8>> {
        let link = self.link(name)?;
        link.attributes
            .into_iter()
            .find_map(|attribute| {
                if let LinkAttribute::Address(mac) = attribute {
                    Some(mac)
                } else {
                    None
                }
            })
            .with_context(|| format!("{name} has no hardware address"))
    }

    /// The names of all interfaces.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let links = self.links()?;
        Ok(links
            .iter()
            .filter_map(|link| name_of(link).map(str::to_owned))
            .collect())
    }

    /// Adds a bridge (without spanning tree, so ports forward at once) and sets it up.
    pub fn add_bridge(&self, name: &str) -> Result<()> {
        self.add_link(name, InfoKind::Bridge, None)?;
        self.set_up(name)
    }

    /// Adds a veth pair, one end here and the other in `peer`, and sets both ends up.
    pub fn add_veth(&self, name: &str, peer: &Ns, peer_name: &str) -> Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer_name.to_owned()),
            LinkAttribute::NetNsFd(peer.fd().as_raw_fd()),
        ];
        self.add_link(
            name,
            InfoKind::Veth,
            Some(InfoData::Veth(InfoVeth::Peer(other))),
        )?;
        peer.set_up(peer_name)?;
        self.set_up(name)
    }

    fn add_link(&self, name: &str, kind: InfoKind, data: Option<InfoData>) -> Result<()> {
        let what = format!("adding {kind:?} interface {name} in {}", self.name());
        let mut info = vec![LinkInfo::Kind(kind)];
        info.extend(data.map(LinkInfo::Data));
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(info),
        ];
        self.netlink()
            .request(RouteNetlinkMessage::NewLink(message), NEW)
            .context(what)
    }

    /// Removes an interface.
    pub fn del_link(&self, name: &str) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.ifindex(name)?;
        let request = RouteNetlinkMessage::DelLink(message);
        self.netlink()
            .request(request, 0)
            .with_context(|| format!("removing interface {name} in {}", self.name()))
    }

    /// Sets an interface up.
    pub fn set_up(&self, name: &str) -> Result<()> {
        self.change_link(name, "setting up", |message| {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        })
    }

    /// Sets an interface down.
    pub fn set_down(&self, name: &str) -> Result<()> {
        self.change_link(name, "setting down", |message| {
            message.header.change_mask = LinkFlags::Up
        })
    }

    /// Moves an interface into another namespace under a new name, and sets it up there.
    pub fn move_link(&self, name: &str, to: &Ns, new_name: &str) -> Result<()> {
        self.change_link(name, "moving", |message| {
            message
                .attributes
                .push(LinkAttribute::NetNsFd(to.fd().as_raw_fd()));
            message
                .attributes
                .push(LinkAttribute::IfName(new_name.to_owned()));
        })?;
        to.set_up(new_name)
    }

    /// Gives an interface another name; it must be down on kernels before 6.2.
    pub fn rename_link(&self, name: &str, new_name: &str) -> Result<()> {
        self.change_link(name, "renaming", |message| {
            message
                .attributes
                .push(LinkAttribute::IfName(new_name.to_owned()));
        })
    }

    /// Makes an interface a port of a bridge.
    pub fn set_master(&self, name: &str, bridge: &str) -> Result<()> {
        let index = self.ifindex(bridge)?;
        self.change_link(name, "adding to a bridge", |message| {
            message.attributes.push(LinkAttribute::Controller(index));
        })
    }

    /// Sets an interface's MTU.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<()> {
        self.change_link(name, "setting the MTU of", |message| {
            message.attributes.push(LinkAttribute::Mtu(mtu))
        })
    }

    fn change_link(
        &self,
        name: &str,
        verb: &str,
        change: impl FnOnce(&mut LinkMessage),
    ) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.ifindex(name)?;
        change(&mut message);
        let request = RouteNetlinkMessage::SetLink(message);
        self.netlink()
            .request(request, 0)
            .with_context(|| format!("{verb} interface {name} in {}", self.name()))
    }

    /// Adds an address; IPv6 addresses skip duplicate detection and work at once.
    pub fn add_addr(&self, ifname: &str, addr: IpNet) -> Result<()> {
        let message = self.addr_message(ifname, addr)?;
        let request = RouteNetlinkMessage::NewAddress(message);
        self.netlink()
            .request(request, NEW)
            .with_context(|| format!("adding {addr} to {ifname} in {}", self.name()))
    }

    /// Removes an address.
    pub fn del_addr(&self, ifname: &str, addr: IpNet) -> Result<()> {
        let message = self.addr_message(ifname, addr)?;
        let request = RouteNetlinkMessage::DelAddress(message);
        self.netlink()
            .request(request, 0)
            .with_context(|| format!("removing {addr} from {ifname} in {}", self.name()))
    }

    fn addr_message(&self, ifname: &str, addr: IpNet) -> Result<AddressMessage> {
        let mut message = AddressMessage::default();
        message.header.family = family_of(addr.addr());
        message.header.prefix_len = addr.prefix_len();
        message.header.index = self.ifindex(ifname)?;
        message.attributes = vec![
            AddressAttribute::Address(addr.addr()),
            AddressAttribute::Local(addr.addr()),
        ];
        if addr.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        Ok(message)
    }

    /// All addresses, by interface index.
    pub fn addrs(&self) -> Result<Vec<(u32, IpNet)>> {
        self.netlink()
            .dump(
                RouteNetlinkMessage::GetAddress(AddressMessage::default()),
                |answer| {
                    let RouteNetlinkMessage::NewAddress(message) = answer else {
                        return None;
                    };
                    let of = |attribute: &AddressAttribute| match attribute {
                        AddressAttribute::Address(addr) => Some(*addr),
                        _ => None,
                    };
                    let addr = message.attributes.iter().find_map(of)?;
                    Some((
                        message.header.index,
                        IpNet::new(addr, message.header.prefix_len).ok()?,
                    ))
                },
            )
            .with_context(|| format!("listing addresses of {}", self.name()))
    }

    /// The IPv6 link-local address of an interface, made by the kernel.
    pub fn link_local(&self, ifname: &str) -> Result<std::net::Ipv6Addr> {
        let index = self.ifindex(ifname)?;
        self.addrs()?
            .into_iter()
            .find_map(|(at, net)| match net.addr() {
                IpAddr::V6(addr) if at == index && addr.is_unicast_link_local() => Some(addr),
                _ => None,
            })
            .with_context(|| format!("{ifname} in {} has no link-local address", self.name()))
    }

    /// Writes down a neighbour's hardware address, so that packets leave for it without asking.
    pub fn add_neighbour(&self, ifname: &str, addr: IpAddr, mac: &[u8]) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(addr);
        message.header.ifindex = self.ifindex(ifname)?;
        message.header.state = NeighbourState::Permanent;
        let destination = match addr {
            IpAddr::V4(addr) => NeighbourAddress::Inet(addr),
            IpAddr::V6(addr) => NeighbourAddress::Inet6(addr),
        };
        message.attributes = vec![
            NeighbourAttribute::Destination(destination),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let request = RouteNetlinkMessage::NewNeighbour(message);
        self.netlink()
            .request(request, NEW)
            .with_context(|| format!("adding neighbour {addr} in {}", self.name()))
    }

    fn links(&self) -> Result<Vec<LinkMessage>> {
        self.netlink()
            .dump(
                RouteNetlinkMessage::GetLink(LinkMessage::default()),
                |answer| match answer {
                    RouteNetlinkMessage::NewLink(message) => Some(message),
                    _ => None,
                },
            )
            .with_context(|| format!("listing interfaces of {}", self.name()))
    }

    fn link(&self, name: &str) -> Result<LinkMessage> {
        // Asked for by name: the node of a large lab has hundreds.
        let mut question = LinkMessage::default();
        question.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        let what = || format!("looking for interface {name} in {}", self.name());
        self.netlink()
            .get(
                RouteNetlinkMessage::GetLink(question),
                |answer| match answer {
                    RouteNetlinkMessage::NewLink(message) => Some(message),
                    _ => None,
                },
            )
            .with_context(what)?
            .with_context(what)
    }
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}
