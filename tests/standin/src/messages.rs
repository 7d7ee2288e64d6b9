//! The messages of package `istio.workload.zds`, written out by hand so that no protobuf compiler is needed.
//!
//! Owns field numbers and types, nothing else: what the messages mean is `manager`'s business, how they travel is `zds`'s.
//! The tests hold the bytes to what the published schema demands.

/// The version of the conversation, announced in the hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Version {
    /// Never sent.
    NotUsed = 0,
    /// The only version there is.
    V1 = 1,
}

/// The first message, from the proxy.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ZdsHello {
    /// What the proxy speaks.
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
}

/// Who a pod is, for its certificate and for logs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadInfo {
    /// The pod's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The pod's namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// The pod's service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// Serve this pod; its network namespace travels beside the message as a file descriptor.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AddWorkload {
    /// The pod's UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Mandatory, although the wire format lets it be left out.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// In the snapshot: go on serving this pod, its namespace follows later.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeepWorkload {
    /// The pod's UID.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// Stop serving this pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DelWorkload {
    /// The pod's UID.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// Everything that has not been named since the hello is gone.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SnapshotSent {}

/// What the node agent sends.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadRequest {
    /// Exactly one of these.
    #[prost(oneof = "Request", tags = "1, 2, 3, 5")]
    pub payload: Option<Request>,
}

/// The body of a [`WorkloadRequest`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Request {
    /// See [`AddWorkload`].
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// See [`DelWorkload`].
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// See [`SnapshotSent`].
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// See [`KeepWorkload`].
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// The answer to a request: an empty text means that it was carried out.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ack {
    /// Why it was not carried out.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// What the proxy sends back.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadResponse {
    /// Exactly one of these.
    #[prost(oneof = "Response", tags = "1")]
    pub payload: Option<Response>,
}

/// The body of a [`WorkloadResponse`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Response {
    /// See [`Ack`].
    #[prost(message, tag = "1")]
    Ack(Ack),
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    fn golden<M: prost::Message + Default + PartialEq + std::fmt::Debug>(
        message: &M,
        bytes: &[u8],
    ) {
        assert_eq!(message.encode_to_vec(), bytes);
        assert_eq!(&M::decode(bytes).unwrap(), message);
    }

    fn request(payload: Request) -> WorkloadRequest {
        WorkloadRequest {
            payload: Some(payload),
        }
    }

    #[test]
    fn hello() {
        golden(
            &ZdsHello {
                version: Version::V1.into(),
            },
            &[0x08, 0x01],
        );
    }

    #[test]
    fn add() {
        let info = WorkloadInfo {
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "sa".into(),
        };
        golden(
            &request(Request::Add(AddWorkload {
                uid: "u1".into(),
                workload_info: Some(info),
            })),
            b"\x0a\x15\x0a\x02u1\x12\x0f\x0a\x03web\x12\x04shop\x1a\x02sa",
        );
    }

    #[test]
    fn del_keeps_its_uid_under_tag_two() {
        golden(
            &request(Request::Del(DelWorkload { uid: "u1".into() })),
            b"\x12\x04\x12\x02u1",
        );
    }

    #[test]
    fn snapshot_sent() {
        golden(
            &request(Request::SnapshotSent(SnapshotSent {})),
            b"\x1a\x00",
        );
    }

    #[test]
    fn keep_is_tag_five() {
        golden(
            &request(Request::Keep(KeepWorkload { uid: "u1".into() })),
            b"\x2a\x04\x0a\x02u1",
        );
    }

    #[test]
    fn ack_and_nack() {
        let ack = |error: &str| WorkloadResponse {
            payload: Some(Response::Ack(Ack {
                error: error.into(),
            })),
        };
        golden(&ack(""), b"\x0a\x00");
        golden(&ack("no"), b"\x0a\x04\x0a\x02no");
    }

    #[test]
    fn unknown_fields_are_skipped() {
        let decoded = ZdsHello::decode(&b"\x08\x01\x52\x03new"[..]).unwrap();
        assert_eq!(decoded.version, i32::from(Version::V1));
    }
}
