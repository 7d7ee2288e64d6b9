//! Who is called what and has which address in a cluster. Pure: it decides, and touches nothing.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The numbers of one cluster on this machine: each has its own, so that several can be up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan(pub(crate) u8);

/// How many clusters a machine can hold.
pub(crate) const CLUSTERS: u8 = 50;
/// How many nodes a cluster can have.
pub(crate) const NODES: u8 = 9;

impl Plan {
    /// The bridge between nodes and API server, and the beginning of every name that the whole machine sees.
    pub(crate) fn bridge(self) -> String {
        format!("cvk{}", self.0)
    }

    /// The API server's address, on that bridge.
    pub(crate) fn api(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self.0, 1)
    }

    /// The same for IPv6; the API server does not listen there.
    pub(crate) fn api6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd30, 0, 0, self.0.into(), 0, 0, 0, 1)
    }

    /// A node's addresses. Nodes count from 1.
    pub(crate) fn node(self, node: u8) -> (Ipv4Addr, Ipv6Addr) {
        (
            Ipv4Addr::new(172, 30, self.0, 10 + node),
            Ipv6Addr::new(0xfd30, 0, 0, self.0.into(), 0, 0, 0, (10 + node).into()),
        )
    }

    /// What a node is called in Kubernetes.
    pub(crate) fn node_name(node: u8) -> String {
        format!("node{node}")
    }

    /// What a node's network namespace and cgroups are called.
    pub(crate) fn node_id(self, node: u8) -> String {
        format!("{}-node{node}", self.bridge())
    }

    /// The bridge's end of the cable to a node.
    pub(crate) fn port(self, node: u8) -> String {
        format!("{}n{node}", self.bridge())
    }

    /// The ranges of a node's pods, IPv4 and IPv6.
    pub(crate) fn pods(self, node: u8) -> [String; 2] {
        [
            format!("10.{}.{node}.0/24", 200 + self.0),
            format!("fd10:0:{:x}:{node}::/64", self.0),
        ]
    }

    /// The ranges of all pods.
    pub(crate) fn all_pods(self) -> String {
        format!("10.{}.0.0/16,fd10:0:{:x}::/48", 200 + self.0, self.0)
    }

    /// For `ip -batch`: the bridge, which exists already, made ready, and the way from here to the pods.
    pub(crate) fn host_commands(self, nodes: u8) -> String {
        let bridge = self.bridge();
        let mut batch = format!(
            "addr add {}/24 dev {bridge}\naddr add {}/64 dev {bridge} nodad\nlink set {bridge} up\n",
            self.api(),
            self.api6()
        );
        for node in 1..=nodes {
            batch += &self.pod_routes(node, &bridge);
        }
        batch
    }

    /// For `ip -batch`: the cable to a node whose namespace exists.
    pub(crate) fn cable_commands(self, node: u8) -> String {
        let (bridge, port, id) = (self.bridge(), self.port(node), self.node_id(node));
        format!(
            "link add {port} type veth peer name eth0 netns {id}\nlink set {port} master {bridge}\nlink set {port} up\n"
        )
    }

    /// For `ip -batch` in a node's namespace.
    pub(crate) fn node_commands(self, node: u8, nodes: u8) -> String {
        let (v4, v6) = self.node(node);
        let mut batch = format!(
            "link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via {}\nroute add default via {}\n",
            self.api(),
            self.api6()
        );
        for other in (1..=nodes).filter(|other| *other != node) {
            batch += &self.pod_routes(other, "eth0");
        }
        batch
    }

    fn pod_routes(self, node: u8, dev: &str) -> String {
        let (v4, v6) = self.node(node);
        let [pods4, pods6] = self.pods(node);
        format!("route add {pods4} via {v4} dev {dev}\nroute add {pods6} via {v6} dev {dev}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_and_nodes_do_not_share_anything() {
        let (one, two) = (Plan(0), Plan(1));
        assert_ne!(one.api(), two.api());
        assert_ne!(one.pods(1), two.pods(1));
        assert_ne!(one.pods(1), one.pods(2));
        assert_ne!(one.node(1), one.node(2));
        assert_eq!(Plan(49).pods(9), ["10.249.9.0/24", "fd10:0:31:9::/64"]);
        assert_eq!(Plan(49).all_pods(), "10.249.0.0/16,fd10:0:31::/48");
        // Interface names have 15 bytes.
        assert!(Plan(CLUSTERS).port(NODES).len() <= 15);
    }

    #[test]
    fn a_node_routes_to_the_pods_of_the_others_only() {
        let commands = Plan(3).node_commands(2, 3);
        assert!(commands.contains("route add 10.203.1.0/24 via 172.30.3.11 dev eth0"));
        assert!(commands.contains("route add 10.203.3.0/24"));
        assert!(!commands.contains("route add 10.203.2.0/24"));
    }
}
