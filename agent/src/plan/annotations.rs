//! What pods and namespaces ask for by annotations, read as leniently as istio-cni does: a bad value is left out and
//! complained about, never guessed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use culvert_ebpf::abi::MAX_VIRTUAL;
use ipnet::IpNet;

/// Annotations of an object.
pub type Annotations = BTreeMap<String, String>;

/// Most ports or networks one pod may exclude: the kernel's maps are shared by all pods of the node.
pub const MAX_EXCLUSIONS: usize = 128;
/// Longest name of a network interface.
const IFNAME: usize = 15;

/// Go's `strconv.ParseBool`.
#[must_use]
pub fn parse_bool(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Reads annotations and collects what is wrong with them.
#[derive(Debug)]
pub struct Reader<'a> {
    pod: &'a Annotations,
    namespace: &'a Annotations,
    /// One sentence for each bad value.
    pub warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    /// Annotations of a pod and of its namespace.
    #[must_use]
    pub fn new(pod: &'a Annotations, namespace: &'a Annotations) -> Self {
        Self {
            pod,
            namespace,
            warnings: Vec::new(),
        }
    }

    /// A switch on the pod.
    pub fn switch(&mut self, key: &str) -> Option<bool> {
        let value = self.pod.get(key)?;
        let parsed = parse_bool(value);
        if parsed.is_none() {
            self.warnings.push(format!(
                "annotation {key}={value:?} is ignored: use \"true\" or \"false\""
            ));
        }
        parsed
    }

    /// Names of interfaces, from the pod.
    pub fn interfaces(&mut self, key: &str) -> Vec<String> {
        let pod = self.pod;
        let good = |name: &str| {
            let fits = name.len() <= IFNAME && name != "." && name != "..";
            let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
            (fits && !name.contains(bad)).then(|| name.to_owned())
        };
        let what = "the name of a network interface of the pod";
        self.list(key, pod.get(key), MAX_VIRTUAL, what, good)
    }

    /// Ports, from the pod or else its namespace.
    pub fn ports(&mut self, key: &str) -> BTreeSet<u16> {
        let good = |port: &str| port.parse().ok().filter(|p| *p != 0);
        let what = "a port from 1 to 65535";
        let value = self.either(key);
        let list = self.list(key, value, MAX_EXCLUSIONS, what, good);
        list.into_iter().collect()
    }

    /// Networks, from the pod or else its namespace.
    pub fn networks(&mut self, key: &str) -> BTreeSet<IpNet> {
        let good = |net: &str| {
            let host = || net.parse().map(|a: IpAddr| IpNet::from(a)).ok();
            let net: Option<IpNet> = net.parse().ok().or_else(host);
            net.map(|n| n.trunc())
        };
        let what = "an address or a network such as 192.0.2.0/24 or 2001:db8::/32";
        let value = self.either(key);
        let list = self.list(key, value, MAX_EXCLUSIONS, what, good);
        list.into_iter().collect()
    }

    /// The pod's value stands in place of its namespace's, also if it is empty.
    fn either(&self, key: &str) -> Option<&'a String> {
        self.pod.get(key).or_else(|| self.namespace.get(key))
    }

    fn list<T: PartialEq>(
        &mut self,
        key: &str,
        value: Option<&String>,
        most: usize,
        what: &str,
        good: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let mut list = Vec::new();
        let items = value.map(String::as_str).unwrap_or_default().split(',');
        for item in items.map(str::trim).filter(|i| !i.is_empty()) {
            match good(item) {
                None => self.warnings.push(format!(
                    "{item:?} in annotation {key} is ignored: not {what}"
                )),
                Some(item) if list.contains(&item) => {}
                Some(_) if list.len() == most => {
                    self.warnings.push(format!(
                        "annotation {key} has more than {most} entries: those from {item:?} on are ignored"
                    ));
                    break;
                }
                Some(item) => list.push(item),
            }
        }
        list
    }
}
