//! The messages of package `istio.workload.zds`, written out by hand so that no protobuf compiler is needed.
//!
//! Owns field numbers, types and the bound on a packet's size. When a message may be sent is `conversation`'s business,
//! how it travels is `socket`'s.

use prost::Message as _;

use super::terms::{Message, Workload};
use crate::model::PodUid;

/// The longest packet either side reads.
pub const MAX_PACKET: usize = 1024;

/// The only version of the conversation there is.
pub const VERSION: i32 = 1;

/// The first message, from ztunnel.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ZdsHello {
    /// [`VERSION`]. A plain number, so that an unknown one can be named in an error.
    #[prost(int32, tag = "1")]
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
    /// The pod's UID. The published schema has no field 1.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// What has not been named since the hello is gone.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SnapshotSent {}

/// What the agent sends.
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

/// What ztunnel sends back.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadResponse {
    /// The only kind of answer there is; without it the packet is none.
    #[prost(message, optional, tag = "1")]
    pub ack: Option<Ack>,
}

impl Request {
    /// The message for a pod; its descriptor goes beside it.
    pub(super) fn add(uid: &PodUid, workload: &Workload) -> Self {
        Self::Add(AddWorkload {
            uid: uid.as_str().to_owned(),
            workload_info: Some(WorkloadInfo {
                name: workload.name.clone(),
                namespace: workload.namespace.clone(),
                service_account: workload.service_account.clone(),
            }),
        })
    }

    /// The packet that carries it.
    #[must_use]
    pub fn into_packet(self) -> Vec<u8> {
        WorkloadRequest {
            payload: Some(self),
        }
        .encode_to_vec()
    }
}

impl<N> From<Message<N>> for Request {
    fn from(message: Message<N>) -> Self {
        match message {
            Message::Add { uid, workload, .. } => Self::add(&uid, &workload),
            Message::Keep { uid } => Self::Keep(KeepWorkload {
                uid: uid.as_str().to_owned(),
            }),
            Message::SnapshotSent => Self::SnapshotSent(SnapshotSent {}),
            Message::Del { uid } => Self::Del(DelWorkload {
                uid: uid.as_str().to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden<M: prost::Message + Default + PartialEq + std::fmt::Debug>(
        message: &M,
        bytes: &[u8],
    ) {
        assert_eq!(message.encode_to_vec(), bytes);
        assert_eq!(&M::decode(bytes).unwrap(), message);
    }

    #[test]
    fn every_message_has_the_bytes_of_the_published_schema() {
        golden(&ZdsHello { version: 1 }, &[0x08, 0x01]);
        let info = WorkloadInfo {
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "sa".into(),
        };
        let requests = [
            (
                Request::Add(AddWorkload {
                    uid: "u1".into(),
                    workload_info: Some(info),
                }),
                &b"\x0a\x15\x0a\x02u1\x12\x0f\x0a\x03web\x12\x04shop\x1a\x02sa"[..],
            ),
            (
                Request::Del(DelWorkload { uid: "u1".into() }),
                b"\x12\x04\x12\x02u1",
            ),
            (Request::SnapshotSent(SnapshotSent {}), b"\x1a\x00"),
            (
                Request::Keep(KeepWorkload { uid: "u1".into() }),
                b"\x2a\x04\x0a\x02u1",
            ),
        ];
        for (request, bytes) in requests {
            assert_eq!(request.clone().into_packet(), bytes);
            let payload = Some(request);
            assert_eq!(
                WorkloadRequest::decode(bytes).unwrap(),
                WorkloadRequest { payload }
            );
        }
        let answer = |error: &str| WorkloadResponse {
            ack: Some(Ack {
                error: error.into(),
            }),
        };
        golden(&answer(""), b"\x0a\x00");
        golden(&answer("no"), b"\x0a\x04\x0a\x02no");
    }

    #[test]
    fn fields_of_a_later_schema_are_skipped() {
        let hello = ZdsHello::decode(&b"\x08\x01\x52\x03new"[..]).unwrap();
        assert_eq!(hello.version, VERSION);
    }
}
