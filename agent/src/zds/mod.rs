//! The conversation with ztunnel: which pods' namespaces it is to serve, over a SOCK_SEQPACKET socket.
//!
//! Knows neither Kubernetes nor the kernel's maps.
