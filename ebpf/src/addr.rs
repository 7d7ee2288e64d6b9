//! One form for every address: 16 bytes in network byte order, IPv4 written as `::ffff:a.b.c.d`.
//!
//! A v4-mapped IPv6 socket and a plain IPv4 packet then compare equal without a special case, which is
//! what makes `AF_INET6` sockets that speak IPv4 harmless.

/// An IP address as four 32-bit words, each holding network byte order bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addr {
    /// The words as the kernel hands them out (`remote_ip6[i]`); IPv4 sits in the last one.
    pub words: [u32; 4],
}

/// Third word of a v4-mapped address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`, which stands for no address at all.
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };

    /// From an IPv4 address whose bytes are in network order in memory.
    #[inline(always)]
    #[must_use]
    pub const fn v4(ip_be: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, ip_be],
        }
    }

    /// From the four words of an IPv6 address, network order in memory.
    #[inline(always)]
    #[must_use]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From the sixteen bytes of an IPv6 (or v4-mapped) address.
    #[must_use]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self {
            words: [
                u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
            ],
        }
    }

    /// The sixteen bytes in network order.
    #[must_use]
    pub fn octets(self) -> [u8; 16] {
        let mut out = [0; 16];
        for (chunk, word) in out.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    /// True for IPv4, mapped or not.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// 127.0.0.0/8 or ::1.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if self.words[0] != 0 || self.words[1] != 0 {
            return false;
        }
        if self.words[2] == MAPPED {
            return self.words[3].to_ne_bytes()[0] == 127;
        }
        self.words[2] == 0 && self.words[3] == 1_u32.to_be()
    }

    /// 0.0.0.0 or ::, which mean "this host" as a destination.
    #[inline(always)]
    #[must_use]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// fe80::/10: means something on one link only.
    #[inline(always)]
    #[must_use]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// 224.0.0.0/4, 255.255.255.255 or ff00::/8.
    #[inline(always)]
    #[must_use]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            self.words[3].to_ne_bytes()[0] >= 224 && self.words[3].to_ne_bytes()[0] < 240
                || self.words[3] == u32::MAX
        } else {
            self.words[0].to_ne_bytes()[0] == 0xff
        }
    }
}

impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::from_octets(v4.to_ipv6_mapped().octets()),
            core::net::IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> Self {
        core::net::Ipv6Addr::from(addr.octets()).to_canonical()
    }
}
