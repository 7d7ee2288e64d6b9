//! Small programs of somebody else's on a cgroup's socket address hooks: one that does nothing, and one that replaces an
//! address as a translator of service addresses does. Assembled by hand, so that tests need no compiler; they know
//! nothing of Culvert's.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper here")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context as _, Result};

const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const SOCK_ADDR: u32 = 18;
/// Of a link: before all that is attached there. Linux 6.17 and later.
const BEFORE: u32 = 1 << 3;
/// Size of the attribute union as far as the calls here need it.
const ATTR: usize = 72;

/// Offsets in `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// A hook, with the kernel's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the kernel's own name")]
#[repr(u32)]
pub enum HookPoint {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
}

impl HookPoint {
    /// Those that see where a datagram goes or came from.
    pub const ALL: [Self; 8] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Recvmsg4,
        Self::Recvmsg6,
        Self::Getpeername4,
        Self::Getpeername6,
    ];
}

/// Programs that stay attached until this is dropped.
#[derive(Debug)]
pub struct Hooks {
    _links: Vec<OwnedFd>,
}

impl Hooks {
    /// Programs that let everything pass, at every hook of a cgroup.
    pub fn empty(cgroup: &Path) -> Result<Self> {
        Self::attach(cgroup, 0, &HookPoint::ALL.map(|at| (at, pass())))
    }

    /// The same, before all others of that cgroup.
    pub fn first(cgroup: &Path) -> Result<Self> {
        Self::attach(cgroup, BEFORE, &HookPoint::ALL.map(|at| (at, pass())))
    }

    /// Sends to `backend` what is for `service`, on one port, and answers under the name of `service`: socket load
    /// balancing at its smallest.
    pub fn translate(
        cgroup: &Path,
        service: Ipv4Addr,
        backend: Ipv4Addr,
        port: u16,
    ) -> Result<Self> {
        let there = |at| (at, replace(service, backend, port));
        let back = |at| (at, replace(backend, service, port));
        Self::attach(
            cgroup,
            0,
            &[
                there(HookPoint::Connect4),
                there(HookPoint::Sendmsg4),
                back(HookPoint::Recvmsg4),
                back(HookPoint::Getpeername4),
            ],
        )
    }

    fn attach(cgroup: &Path, flags: u32, programs: &[(HookPoint, Vec<u64>)]) -> Result<Self> {
        let dir = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let links = programs
            .iter()
            .map(|(at, code)| {
                let program = load(*at, code)?;
                link(&program, dir.as_raw_fd(), *at, flags)
            })
            .collect::<io::Result<_>>();
        let links = links.with_context(|| format!("attaching to {}", cgroup.display()))?;
        Ok(Self { _links: links })
    }
}

/// One instruction: operation, registers, offset, immediate value.
fn insn(op: u8, dst: u8, src: u8, offset: i16, value: u32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([op, dst | src << 4, low, high, a, b, c, d])
}

fn pass() -> Vec<u64> {
    vec![insn(0xb7, 0, 0, 0, 1), insn(0x95, 0, 0, 0, 0)]
}

fn replace(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u64> {
    let word = |ip: Ipv4Addr| u32::from_ne_bytes(ip.octets());
    let port = u32::from(port.to_be());
    let mut code = vec![
        // Word loads, 32-bit compares.
        insn(0x61, 2, 1, USER_IP4, 0),
        insn(0x56, 2, 0, 4, word(from)),
        insn(0x61, 2, 1, USER_PORT, 0),
        insn(0x56, 2, 0, 2, port),
        insn(0xb4, 2, 0, 0, word(to)),
        insn(0x63, 1, 2, USER_IP4, 0),
    ];
    code.extend(pass());
    code
}

fn put(attr: &mut [u8; ATTR], at: usize, bytes: &[u8]) {
    attr[at..at + bytes.len()].copy_from_slice(bytes);
}

fn call(command: libc::c_int, attr: &mut [u8; ATTR]) -> io::Result<OwnedFd> {
    // SAFETY: the attribute is ours and as long as said; pointers in it are to buffers that outlive the call.
    let code = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), ATTR) };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(code).map_err(io::Error::other)?;
    // SAFETY: the call has just made this descriptor, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn load(at: HookPoint, code: &[u64]) -> io::Result<OwnedFd> {
    let licence = CString::new("GPL")?;
    let count = u32::try_from(code.len()).map_err(io::Error::other)?;
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &SOCK_ADDR.to_ne_bytes());
    put(&mut attr, 4, &count.to_ne_bytes());
    put(&mut attr, 8, &(code.as_ptr() as u64).to_ne_bytes());
    put(&mut attr, 16, &(licence.as_ptr() as u64).to_ne_bytes());
    put(&mut attr, 48, b"somebody_elses\0");
    put(&mut attr, 68, &(at as u32).to_ne_bytes());
    call(PROG_LOAD, &mut attr)
}

fn link(program: &OwnedFd, cgroup: RawFd, at: HookPoint, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &program.as_raw_fd().to_ne_bytes());
    put(&mut attr, 4, &cgroup.to_ne_bytes());
    put(&mut attr, 8, &(at as u32).to_ne_bytes());
    put(&mut attr, 12, &flags.to_ne_bytes());
    call(LINK_CREATE, &mut attr)
}
