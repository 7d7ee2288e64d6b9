//! Is everything here that Culvert needs? Answers with all that is missing at once, each with its cure.
//!
//! Features are tried, never read from a version number: each probe is a program of a few instructions that
//! calls one helper or reads one field.

use std::{borrow::Cow, fs, io, path::Path, sync::OnceLock};

use aya_obj::generated::bpf_insn;
use serde::Serialize;

use super::{
    cgroup,
    error::{Error, Result},
    object,
    pins::Pins,
    privileges, sys,
};

/// One thing Culvert needs.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: Cow<'static, str>,
    /// It is there.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// What to do when it is not.
    pub cure: String,
}

fn check(name: &'static str, result: Result<String, String>, cure: impl Into<String>) -> Check {
    let ok = result.is_ok();
    let (Ok(detail) | Err(detail)) = result;
    Check {
        name: name.into(),
        ok,
        detail,
        cure: if ok { String::new() } else { cure.into() },
    }
}

/// Looks at everything; changes nothing.
#[must_use]
pub fn run(bpffs: &Path, cgroup_root: Option<&Path>) -> Vec<Check> {
    let mut checks = capabilities();
    checks.push(check(
        "bpffs",
        Pins::at(bpffs)
            .check_bpffs()
            .map(|()| bpffs.display().to_string())
            .map_err(|e| e.to_string()),
        "mount -t bpf bpf /sys/fs/bpf",
    ));
    let found = match cgroup_root {
        Some(path) => Ok(path.to_owned()),
        None => cgroup::find_root(),
    };
    let opened = found.and_then(|path| cgroup::open(&path, cgroup_root.is_some()).map(|_| path));
    checks.push(check(
        "cgroup v2",
        opened
            .map(|p| p.display().to_string())
            .map_err(|e| e.to_string()),
        "mount -t cgroup2 none /sys/fs/cgroup/unified, or --cgroup-root",
    ));
    checks.extend(features());
    checks.push(check(
        "tcp_fwmark_accept",
        readable("/proc/sys/net/ipv4/tcp_fwmark_accept"),
        "a kernel built with CONFIG_INET, and /proc mounted",
    ));
    checks
}

fn readable(path: &str) -> Result<String, String> {
    fs::read_to_string(path)
        .map(|_| "present".to_owned())
        .map_err(|e| format!("{path}: {e}"))
}

fn capabilities() -> Vec<Check> {
    let missing = privileges::missing();
    let lacks = |need: &privileges::Need| match &missing {
        Ok(missing) => missing
            .iter()
            .any(|m| m.name == need.name)
            .then(|| format!("missing; needed for {}", need.why)),
        Err(error) => Some(error.to_string()),
    };
    let check_of = |need: &'static privileges::Need| {
        let result = lacks(need).map_or_else(|| Ok(need.why.to_owned()), Err);
        check(
            need.name,
            result,
            format!("run as root, or add {}", need.name),
        )
    };
    privileges::NEEDED.iter().map(check_of).collect()
}

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> bpf_insn {
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: aya_obj::generated::__BindgenBitfieldUnit::new([src << 4 | dst]),
        off,
        imm,
    }
}

const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const MOV_IMM: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const ADD_IMM: u8 = 0x07;
const LOAD_W: u8 = 0x61;

/// `helper(ctx); return 1`.
const fn calls(helper: i32) -> [bpf_insn; 3] {
    [
        insn(CALL, 0, 0, 0, helper),
        insn(MOV_IMM, 0, 0, 0, 1),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// `bpf_get_ns_current_pid_tgid(0, 0, stack, 8); return 1`.
const ASKS_PID_NAMESPACE: [bpf_insn; 8] = [
    insn(MOV_REG, 3, 10, 0, 0),
    insn(ADD_IMM, 3, 0, 0, -8),
    insn(MOV_IMM, 1, 0, 0, 0),
    insn(MOV_IMM, 2, 0, 0, 0),
    insn(MOV_IMM, 4, 0, 0, 8),
    insn(CALL, 0, 0, 0, 120),
    insn(MOV_IMM, 0, 0, 0, 1),
    insn(EXIT, 0, 0, 0, 0),
];

/// Can programs ask for a process's id in any PID namespace, not only in the initial one? Tried once.
pub(super) fn tells_any_pid_namespace() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        [object::Kind::Sockopt, object::Kind::Sock]
            .into_iter()
            .all(|kind| {
                let (prog_type, attach_type) = kind.numbers();
                sys::prog_load(
                    "culvert_probe",
                    prog_type,
                    attach_type,
                    &ASKS_PID_NAMESPACE,
                    None,
                )
                .is_ok()
            })
    })
}

const UNTRIED: &str = "cannot be tried without CAP_SYS_ADMIN and CAP_NET_ADMIN";

/// Refuses a kernel that lacks a feature, naming all it lacks: the verifier would name an instruction.
pub(super) fn require_features() -> Result<()> {
    let missing: Vec<_> = features().into_iter().filter(|c| !c.ok).collect();
    if missing.is_empty() {
        return Ok(());
    }
    const OBJECT: &str = "this kernel";
    const OPERATION: &str = "load programs into";
    if missing.iter().any(|c| c.detail == UNTRIED) {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        return Err(Error::system(OPERATION, OBJECT, denied));
    }
    let named: Vec<_> = missing
        .iter()
        .map(|c| format!("{} ({})", c.name, c.detail))
        .collect();
    Err(Error::wrong(
        OPERATION,
        OBJECT,
        format!("missing: {}", named.join("; ")),
        "boot Linux 6.1 or later; `culvert preflight` shows the cure for each, and all else that is missing",
    ))
}

fn features() -> Vec<Check> {
    const GET_NETNS_COOKIE: i32 = 122;
    const GET_CURRENT_PID_TGID: i32 = 14;
    /// Offset of `ingress_ifindex` in `struct bpf_sk_lookup`.
    const INGRESS_IFINDEX: i16 = 64;
    let reads_ifindex = [
        insn(LOAD_W, 2, 1, INGRESS_IFINDEX, 0),
        insn(MOV_IMM, 0, 0, 0, 1),
        insn(EXIT, 0, 0, 0, 0),
    ];
    let newer = |since| {
        format!(
            "a newer kernel (mainline has it since {since}; Culvert is tested on 6.1 and later)"
        )
    };
    vec![
        probe(
            "netns cookie in sock_ops",
            object::Kind::SockOps,
            &calls(GET_NETNS_COOKIE),
            newer("5.15"),
        ),
        probe(
            "netns cookie in setsockopt hooks",
            object::Kind::Sockopt,
            &calls(GET_NETNS_COOKIE),
            newer("5.14"),
        ),
        probe(
            "process id in setsockopt hooks",
            object::Kind::Sockopt,
            &calls(GET_CURRENT_PID_TGID),
            newer("6.1"),
        ),
        probe(
            "process id in socket hooks",
            object::Kind::Sock,
            &calls(GET_CURRENT_PID_TGID),
            newer("6.1"),
        ),
        probe(
            "ingress_ifindex in sk_lookup",
            object::Kind::SkLookup,
            &reads_ifindex,
            newer("5.17"),
        ),
    ]
}

fn probe(name: &'static str, kind: object::Kind, insns: &[bpf_insn], cure: String) -> Check {
    let (prog_type, attach_type) = kind.numbers();
    match sys::prog_load("culvert_probe", prog_type, attach_type, insns, None) {
        Ok(_) => check(name, Ok("supported".to_owned()), ""),
        Err(e)
            if e.kind() == io::ErrorKind::PermissionDenied
                && e.raw_os_error() == Some(libc::EPERM) =>
        {
            check(name, Err(UNTRIED.to_owned()), "run as root")
        }
        Err(e) => check(name, Err(format!("this kernel refuses it: {e}")), cure),
    }
}
