//! Reading decisions as they happen, from the ring buffer.
//!
//! The programs write only while a lease in `CONFIG` runs, which the reader renews: a reader that is killed
//! costs nothing two seconds later.
#![expect(unsafe_code, reason = "the ring buffer is shared memory")]

use std::{
    io,
    net::IpAddr,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use culvert_ebpf::{
    abi::{Config, Event},
    decide::Verdict,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    time::{ClockId, clock_gettime},
};
use serde::Serialize;

use super::{
    error::{Error, Result},
    node::Node,
    sys,
};

const LEASE: Duration = Duration::from_secs(2);

/// CLOCK_MONOTONIC in nanoseconds, what programs call the time.
#[must_use]
pub fn now() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_MONOTONIC) else {
        return 0;
    };
    u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX)
}

/// One decision, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    /// CLOCK_MONOTONIC, ns.
    pub time_ns: u64,
    /// Netns cookie of the pod.
    pub cookie: u64,
    /// Direction as the pod sees it.
    pub direction: &'static str,
    /// What was decided.
    pub verdict: &'static str,
    /// Client.
    pub source: IpAddr,
    /// Its port.
    pub source_port: u16,
    /// Server.
    pub destination: IpAddr,
    /// Its port.
    pub destination_port: u16,
    /// Interface; 0 at connect().
    pub ifindex: u32,
}

impl From<Event> for Decision {
    fn from(e: Event) -> Self {
        let verdict = Verdict::ALL.get(e.verdict as usize);
        Self {
            time_ns: e.time,
            cookie: e.cookie,
            direction: verdict.map_or("unknown", |v| v.direction()),
            verdict: verdict.map_or("unknown", |v| v.name()),
            source: e.src.into(),
            source_port: e.src_port,
            destination: e.dst.into(),
            destination_port: e.dst_port,
            ifindex: e.ifindex,
        }
    }
}

/// A reader. Only one at a time gets each record.
#[derive(Debug)]
pub struct Events<'a> {
    node: &'a Node,
    consumer: NonNull<u8>,
    data: NonNull<u8>,
    page: usize,
    size: usize,
    renewed: u64,
}

impl<'a> Events<'a> {
    /// Maps the buffer and takes the lease.
    pub fn open(node: &'a Node) -> Result<Self> {
        let fail = |e: io::Error| Error::system("map", "the ring buffer of events", e);
        let fd = node.maps().events.as_fd();
        let size = sys::map_info(fd).map_err(fail)?.max_entries as usize;
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .unwrap_or(4096);
        let page = usize::try_from(page).unwrap_or(4096);
        let length = |n: usize| {
            NonZeroUsize::new(n).ok_or_else(|| fail(io::Error::from_raw_os_error(libc::EINVAL)))
        };
        // SAFETY: a fresh mapping of the kernel's choice of place; nothing of ours lies there.
        let consumer = unsafe {
            mmap(
                None,
                length(page)?,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )
        }
        .map_err(|e| fail(e.into()))?;
        let offset = i64::try_from(page).unwrap_or(4096);
        // SAFETY: as above. The data is mapped twice in a row, so that no record wraps.
        let data = unsafe {
            mmap(
                None,
                length(page + 2 * size)?,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                fd,
                offset,
            )
        }
        .map_err(|e| fail(e.into()))?;
        let mut events = Self {
            node,
            consumer: consumer.cast(),
            data: data.cast(),
            page,
            size,
            renewed: 0,
        };
        // What an earlier reader left is old news.
        let end = events.producer().load(Ordering::Acquire);
        events.position().store(end, Ordering::Release);
        events.renew()?;
        Ok(events)
    }

    fn position(&self) -> &AtomicU64 {
        // SAFETY: the first word of a page that is mapped as long as `self` lives; aligned.
        unsafe { self.consumer.cast::<AtomicU64>().as_ref() }
    }

    fn producer(&self) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { self.data.cast::<AtomicU64>().as_ref() }
    }

    fn renew(&mut self) -> Result<()> {
        let _lock = self.node.lock()?;
        let config = self.node.config()?;
        let until = now() + u64::try_from(LEASE.as_nanos()).unwrap_or(0);
        self.node.maps().config.set(
            &0,
            &Config {
                events_until: until,
                ..config
            },
        )?;
        self.renewed = now();
        Ok(())
    }

    /// Waits up to `timeout` and returns what has come.
    pub fn next(&mut self, timeout: Duration) -> Result<Vec<Decision>> {
        if now().saturating_sub(self.renewed) > 1_000_000_000 {
            self.renew()?;
        }
        let mut found = self.take();
        if found.is_empty() {
            let fd = self.node.maps().events.as_fd();
            let wait = PollTimeout::try_from(timeout.min(Duration::from_millis(500)))
                .unwrap_or(PollTimeout::ZERO);
            // Interrupted or not: what is there is taken.
            let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], wait);
            found = self.take();
        }
        Ok(found)
    }

    fn take(&mut self) -> Vec<Decision> {
        const BUSY: u32 = 1 << 31;
        const DISCARDED: u32 = 1 << 30;
        const HEADER: usize = 8;
        let mut found = Vec::new();
        let mut at = self.position().load(Ordering::Acquire);
        let end = self.producer().load(Ordering::Acquire);
        while at < end {
            let offset = self.page + usize::try_from(at).unwrap_or(0) % self.size;
            // SAFETY: below the end of the doubled mapping; records are eight-byte aligned.
            let record = unsafe { self.data.add(offset) };
            // SAFETY: mapped as long as `self` lives, aligned, and only ever accessed atomically.
            let head = unsafe { record.cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
            if head & BUSY != 0 {
                break;
            }
            let length = (head & !(BUSY | DISCARDED)) as usize;
            if head & DISCARDED == 0 && length >= size_of::<Event>() {
                // SAFETY: the payload stands behind the header, within the mapping.
                let payload = unsafe { record.add(HEADER) };
                // SAFETY: the record is complete, so the kernel writes it no more until we move on; `Event`
                // tolerates any bit pattern and records are eight-byte aligned.
                let event = unsafe { payload.cast::<Event>().read() };
                found.push(Decision::from(event));
            }
            at += (length + HEADER).next_multiple_of(8) as u64;
            self.position().store(at, Ordering::Release);
        }
        found
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        if let Ok(config) = self.node.config() {
            let _ = self.node.maps().config.set(
                &0,
                &Config {
                    events_until: 0,
                    ..config
                },
            );
        }
        // SAFETY: both were mapped with these lengths and nobody holds a reference any more.
        unsafe {
            let _ = munmap(self.consumer.cast(), self.page);
        }
        // SAFETY: as above.
        unsafe {
            let _ = munmap(self.data.cast(), self.page + 2 * self.size);
        }
    }
}
