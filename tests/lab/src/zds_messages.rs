//! The messages of package `istio.workload.zds`, written down a second time: were they shared with the stand-in, a wrong
//! number would be wrong on both sides and pass. Nothing but fields.

/// The first word of a ztunnel.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ZdsHello {
    /// 1 is the only version there is.
    #[prost(int32, tag = "1")]
    pub(crate) version: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WorkloadInfo {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) namespace: String,
    #[prost(string, tag = "3")]
    pub(crate) service_account: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct AddWorkload {
    #[prost(string, tag = "1")]
    pub(crate) uid: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) workload_info: Option<WorkloadInfo>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DelWorkload {
    #[prost(string, tag = "2")]
    pub(crate) uid: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SnapshotSent {}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WorkloadRequest {
    #[prost(oneof = "Request", tags = "1, 2, 3")]
    pub(crate) payload: Option<Request>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Request {
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Ack {
    #[prost(string, tag = "1")]
    pub(crate) error: String,
}

/// The answer to each request; there is no other than an acknowledgement.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WorkloadResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) ack: Option<Ack>,
}
