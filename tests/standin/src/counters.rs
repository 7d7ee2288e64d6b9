//! What happened in one pod, counted.
//!
//! Owns the numbers and their names in the statistics; who counts what is said where it happens.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one pod; each only ever grows.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: Counter,)* }

        /// The values of [`Counters`] at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Reads all of them, one after another.
            #[must_use]
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Connections accepted on 15001.
    outbound_accepts,
    /// Connections accepted on 15006.
    inbound_accepts,
    /// TLS connections accepted on 15008.
    hbone_accepts,
    /// CONNECT streams served on 15008.
    hbone_in,
    /// Outbound connections carried in HBONE.
    hbone_out,
    /// Outbound connections passed through as they are.
    passthrough_out,
    /// Connections that arrived at a port of the proxy itself and were refused.
    refused,
    /// Upstreams and apps that could not be reached.
    connect_failures,
    /// DNS queries, UDP and TCP.
    dns_queries,
    /// Payload bytes in both directions, however carried.
    bytes,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Counts `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
