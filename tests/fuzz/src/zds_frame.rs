//! What ztunnel says on the ZDS socket.

/// Packets of a conversation, with everything that may happen between them.
pub fn zds_frame(data: &[u8]) {
    culvert::zds::fuzz::conversation(data);
}
