//! The eBPF object: embedded, parsed once, its programs ready to be loaded any number of times.
//!
//! Per pod only the cookie in `culvert_enter`'s instructions changes. Maps come from the pins or are made
//! here; programs are loaded by `sys::prog_load`.

use std::{
    collections::HashMap,
    hash::Hasher,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use aya_obj::{Object, generated::bpf_insn};
use culvert_ebpf::abi::{self, maps as map_names, programs};

use super::{
    error::{Error, Result},
    maps::Maps,
    preflight,
    sys::{self, MapSpec},
};

/// ELF readers want the file aligned.
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

/// What `cargo xtask build` made; its absence stops the build of this crate.
static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("CULVERT_BPF_OBJECT")));
static OBJECT: &[u8] = &ALIGNED.0;

/// The kinds of program Culvert uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// BPF_PROG_TYPE_SOCK_OPS.
    SockOps,
    /// BPF_PROG_TYPE_CGROUP_SOCKOPT, on setsockopt.
    Sockopt,
    /// BPF_PROG_TYPE_CGROUP_SOCK, on socket(2).
    Sock,
    /// BPF_PROG_TYPE_SK_LOOKUP.
    SkLookup,
    /// BPF_PROG_TYPE_CGROUP_SOCK_ADDR, on one of its hooks.
    SockAddr(u32),
}

impl Kind {
    /// Program type and attach type.
    #[must_use]
    pub const fn numbers(self) -> (u32, u32) {
        match self {
            Self::SockOps => (13, ATTACH_SOCK_OPS),
            Self::Sockopt => (25, ATTACH_SETSOCKOPT),
            Self::Sock => (9, ATTACH_SOCK_CREATE),
            Self::SkLookup => (30, ATTACH_SK_LOOKUP),
            Self::SockAddr(hook) => (18, hook),
        }
    }
}

/// Where programs attach that see sockets made.
pub const ATTACH_SOCK_CREATE: u32 = 2;
/// Where sock_ops programs attach.
pub const ATTACH_SOCK_OPS: u32 = 3;
/// Where setsockopt programs attach.
pub const ATTACH_SETSOCKOPT: u32 = 22;
/// Where sk_lookup programs attach.
pub const ATTACH_SK_LOOKUP: u32 = 36;

const MAP_TYPE_SK_STORAGE: u32 = 24;
const MAP_TYPE_SOCKHASH: u32 = 18;

/// A program that can be loaded.
#[derive(Clone, Debug)]
struct Template {
    name: &'static str,
    kind: Kind,
    insns: Vec<bpf_insn>,
}

/// The node's programs, bound to its maps.
#[derive(Debug)]
pub struct Programs {
    connect: Template,
    sockopt: Template,
    vouch: Template,
    steer: Template,
    enter: Template,
    dns: Vec<Template>,
    /// Where in `enter` the cookie stands.
    cookie_at: Vec<usize>,
}

/// Identity of the embedded object, as it is loaded into this kernel: pins of another one are replaced.
#[must_use]
pub fn id() -> u64 {
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    hasher.write(OBJECT);
    hasher.write(&[u8::from(preflight::tells_any_pid_namespace())]);
    hasher.finish()
}

/// FNV-1a: stable across releases of the standard library, which its default hasher is not.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn broken(what: impl Into<String>) -> Error {
    Error::wrong(
        "read",
        "the embedded eBPF object",
        what,
        "rebuild with `cargo xtask build`",
    )
}

fn parse() -> Result<Object> {
    Object::parse(OBJECT).map_err(|e| broken(e.to_string()))
}

/// The maps the object asks for, in the order of [`map_names::ALL`].
pub fn map_specs() -> Result<Vec<(&'static str, MapSpec)>> {
    let object = parse()?;
    map_names::ALL
        .into_iter()
        .map(|name| {
            let map = object
                .maps
                .get(name)
                .ok_or_else(|| broken(format!("map {name} is missing")))?;
            let mut spec = MapSpec {
                map_type: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
                flags: map.map_flags(),
            };
            if spec.map_type == MAP_TYPE_SOCKHASH {
                // Wide enough for user space to read back each socket's cookie.
                spec.value_size = 8;
            }
            Ok((name, spec))
        })
        .collect()
}

/// Creates one map.
pub fn create_map(name: &'static str, spec: &MapSpec) -> Result<OwnedFd> {
    let fail = |e: io::Error| Error::system("create", format_args!("map {name}"), e);
    if spec.map_type == MAP_TYPE_SK_STORAGE {
        // The kernel takes socket storage only with types: `int` as the key, an array of them as the value.
        let btf = sys::btf_load(&ints_btf(spec.value_size / 4)).map_err(fail)?;
        return sys::map_create(name, spec, Some((btf.as_fd(), 1, 2))).map_err(fail);
    }
    sys::map_create(name, spec, None).map_err(fail)
}

/// BTF with two types: 1 is `int`, 32 bits, signed; 2 is an array of `count` of them.
fn ints_btf(count: u32) -> [u8; 24 + 16 + 24 + 5] {
    const TYPES: u8 = 16 + 24;
    let mut b = [0; 69];
    b[0] = 0x9f; // magic 0xeb9f
    b[1] = 0xeb;
    b[2] = 1; // version
    b[4] = 24; // header length
    b[12] = TYPES; // type section length
    b[16] = TYPES; // string section offset
    b[20] = 5; // string section length
    b[24] = 1; // name offset
    b[31] = 1; // kind INT in bits 24..28 of info
    b[32] = 4; // size
    b[36] = 32; // bits
    b[39] = 1; // signed
    b[47] = 3; // kind ARRAY, without a name
    b[52] = 1; // of type 1
    b[56] = 1; // counted by type 1
    b[60..64].copy_from_slice(&count.to_ne_bytes());
    b[65] = b'i';
    b[66] = b'n';
    b[67] = b't';
    b
}

impl Programs {
    /// Parses the object and binds its programs to `maps`.
    pub fn new(maps: &Maps) -> Result<Self> {
        let mut object = parse()?;
        let fds: HashMap<&str, i32> = maps
            .fds()
            .into_iter()
            .map(|(name, fd)| (name, fd.as_raw_fd()))
            .collect();
        let owned: Vec<_> = object
            .maps
            .iter()
            .filter_map(|(name, map)| {
                fds.get(name.as_str())
                    .map(|fd| (name.clone(), *fd, map.clone()))
            })
            .collect();
        let text: std::collections::HashSet<usize> = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let text = text.into_iter().collect();
        object
            .relocate_maps(
                owned
                    .iter()
                    .map(|(name, fd, map)| (name.as_str(), *fd, map)),
                &text,
            )
            .map_err(|e| broken(e.to_string()))?;
        object
            .relocate_calls(&text)
            .map_err(|e| broken(e.to_string()))?;
        let template = |name: &'static str, kind| {
            let program = object
                .programs
                .get(name)
                .ok_or_else(|| broken(format!("program {name} is missing")))?;
            let function = object
                .functions
                .get(&program.function_key())
                .ok_or_else(|| broken(format!("program {name} has no code")))?;
            Ok(Template {
                name,
                kind,
                insns: function.instructions.clone(),
            })
        };
        let enter = template(programs::ENTER, Kind::SkLookup)?;
        let cookie_at = placeholders(&enter.insns, abi::COOKIE_PLACEHOLDER);
        if cookie_at.is_empty() {
            return Err(broken("culvert_enter has no place for the pod's cookie"));
        }
        Ok(Self {
            connect: template(programs::CONNECT, Kind::SockOps)?,
            sockopt: template(programs::SOCKOPT, Kind::Sockopt)?,
            vouch: template(programs::VOUCH, Kind::Sock)?,
            steer: template(programs::STEER, Kind::SkLookup)?,
            enter,
            dns: programs::DNS
                .into_iter()
                .map(|(name, hook)| template(name, Kind::SockAddr(hook)))
                .collect::<Result<_>>()?,
            cookie_at,
        })
    }

    /// Loads a program of the node: any but `culvert_enter`.
    pub fn load_node(&self, name: &str) -> Result<OwnedFd> {
        let all = [&self.connect, &self.sockopt, &self.vouch, &self.steer];
        let template = all
            .into_iter()
            .chain(&self.dns)
            .find(|t| t.name == name)
            .ok_or_else(|| broken(format!("program {name} is none of the node's")))?;
        let mut insns = template.insns.clone();
        let any = u64::from(preflight::tells_any_pid_namespace());
        for at in placeholders(&insns, abi::PIDNS_PLACEHOLDER) {
            replace(&mut insns, at, any);
        }
        load(template, &insns)
    }

    /// Loads the `culvert_enter` of one pod.
    pub fn load_enter(&self, cookie: u64) -> Result<OwnedFd> {
        let mut insns = self.enter.insns.clone();
        for at in &self.cookie_at {
            replace(&mut insns, *at, cookie);
        }
        load(&self.enter, &insns)
    }
}

/// The two 32-bit immediates of a 64-bit load.
fn halves(value: u64) -> (i32, i32) {
    let b = value.to_le_bytes();
    (
        i32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        i32::from_le_bytes([b[4], b[5], b[6], b[7]]),
    )
}

fn replace(insns: &mut [bpf_insn], at: usize, value: u64) {
    let (low, high) = halves(value);
    insns[at].imm = low;
    insns[at + 1].imm = high;
}

/// Where a constant is loaded that stands for something the loader knows.
fn placeholders(insns: &[bpf_insn], constant: u64) -> Vec<usize> {
    const LD_IMM_DW: u8 = 0x18;
    let (low, high) = halves(constant);
    insns
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0].code == LD_IMM_DW && pair[0].imm == low && pair[1].imm == high)
        .map(|(at, _)| at)
        .collect()
}

fn load(template: &Template, insns: &[bpf_insn]) -> Result<OwnedFd> {
    let name = template.name;
    let (prog_type, attach_type) = template.kind.numbers();
    let first = match sys::prog_load(name, prog_type, attach_type, insns, None) {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    let error = |e| Error::system("load", format_args!("program {name}"), e);
    if matches!(first.raw_os_error(), Some(libc::EPERM | libc::ENOMEM)) {
        return Err(error(first));
    }
    // Once more, to hear why: the log is too costly for every load.
    let mut log = vec![0; 1 << 20];
    match sys::prog_load(name, prog_type, attach_type, insns, Some(&mut log)) {
        Ok(fd) => Ok(fd),
        Err(e) => {
            let end = log.iter().position(|b| *b == 0).unwrap_or(log.len());
            let text = String::from_utf8_lossy(&log[..end]);
            let tail: Vec<&str> = text.lines().rev().take(30).collect();
            for line in tail.iter().rev() {
                tracing::error!(program = name, "verifier: {line}");
            }
            Err(error(e).cured_by(
                "this kernel's verifier refuses the program: run `culvert preflight`, and report the verifier's \
                 lines above with the kernel's version",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_ask_for_the_process_have_a_place_for_what_the_kernel_can_tell() {
        let object = parse().unwrap();
        for name in [programs::SOCKOPT, programs::VOUCH] {
            let function = &object.functions[&object.programs[name].function_key()];
            let found = placeholders(&function.instructions, abi::PIDNS_PLACEHOLDER);
            assert!(!found.is_empty(), "{name}");
        }
    }

    #[test]
    fn the_object_has_every_map_in_the_size_of_its_type() {
        let specs: HashMap<_, _> = map_specs().unwrap().into_iter().collect();
        assert_eq!(
            specs[map_names::PODS].value_size as usize,
            size_of::<abi::Pod>()
        );
        assert_eq!(
            specs[map_names::CONFIG].value_size as usize,
            size_of::<abi::Config>()
        );
        assert_eq!(
            specs[map_names::ROLES].key_size as usize,
            size_of::<abi::RoleKey>()
        );
        assert_eq!(
            specs[map_names::EXCLUDED_CIDRS].key_size as usize,
            4 + size_of::<abi::CidrKey>()
        );
        assert_eq!(
            specs[map_names::COUNTERS].value_size as usize,
            size_of::<abi::Counters>()
        );
        assert_eq!(
            specs[map_names::RECORDS].value_size as usize,
            size_of::<abi::Record>()
        );
        for name in [map_names::ZTUNNELS, map_names::VOUCHERS] {
            assert_eq!(specs[name].key_size as usize, size_of::<abi::ProcessKey>());
            assert_eq!(specs[name].value_size as usize, size_of::<abi::Named>());
        }
    }
}
