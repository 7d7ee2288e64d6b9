//! What the plugin asks the agent: HTTP/1.1 and JSON over a unix socket, to be spoken by `curl --unix-socket` too.
//!
//! Parses, checks, bounds and hands on; decides nothing. What is decided stands behind [`Handler`].

mod counters;
mod listener;
mod routes;
#[cfg(test)]
mod tests;

use std::future::Future;

use culvert_cni::api::{
    AddReply, AddRequest, CheckReply, CheckRequest, DelRequest, GcRequest, Refusal, StatusReply,
};

pub use counters::{Counters, Method};
pub use listener::{BindError, Listener, Peer};
pub use routes::router;

/// Who decides.
///
/// Every method may be dropped at each of its await points: a plugin that is killed, or whose runtime gives up, closes
/// its connection, and the server drops the future of that request at once, as it does when the request's time is over.
/// What has been done by then must be whole or be completed by somebody else, in practice: hand the work to a task that
/// nobody drops, and await its word here. The runtime calls DEL after an ADD that failed, and may come again with the
/// same sandbox, so all methods are idempotent.
pub trait Handler: Send + Sync + 'static {
    /// A pod is about to start. Ends when the pod is captured and ztunnel has acknowledged it, or is known not to be of
    /// the mesh. `request.netns` names a descriptor of the plugin and has to be opened before this ends.
    fn add(&self, request: AddRequest) -> impl Future<Output = Result<AddReply, Refusal>> + Send;

    /// A sandbox or one of its interfaces goes. One that is not known is no error.
    fn del(&self, request: DelRequest) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Looks whether a pod is as its ADD left it; changes nothing.
    fn check(
        &self,
        request: CheckRequest,
    ) -> impl Future<Output = Result<CheckReply, Refusal>> + Send;

    /// What is of `request.network` and not listed is gone.
    fn gc(&self, request: GcRequest) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Whether an ADD could succeed; from memory, without waiting.
    fn status(&self) -> StatusReply;
}
