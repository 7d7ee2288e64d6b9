//! Who is connected, and whose connection goes when there are too many.
//!
//! Anybody who reaches the node can connect. Somebody who opens connections and lets them hang must not keep the
//! kubelet's probes out, so a new connection is never refused: the oldest one of whoever has most makes room.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::task::AbortHandle;

/// Connections at once, for one address we listen on.
pub(super) const MAX: usize = 64;

#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    id: u64,
    peer: IpAddr,
    task: AbortHandle,
}

/// Forgets its connection when dropped, with the task that serves it.
#[derive(Debug)]
pub(super) struct Ticket {
    connections: Connections,
    id: u64,
}

impl Connections {
    /// A place for a connection that is about to be served.
    pub(super) fn ticket(&self) -> Ticket {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.next += 1;
        Ticket {
            connections: self.clone(),
            id: state.next,
        }
    }

    /// Enters a connection, at the expense of another if there are too many.
    pub(super) fn enter(&self, id: u64, peer: IpAddr, task: AbortHandle) {
        let victim = self.make_room(Open { id, peer, task });
        if let Some(victim) = victim {
            tracing::debug!(peer = %victim.peer, "too many connections: the oldest of this peer goes");
            victim.task.abort();
        }
    }

    fn make_room(&self, new: Open) -> Option<Open> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have ended before it was entered.
        if new.task.is_finished() {
            return None;
        }
        let full = state.open.len() >= MAX;
        let at = if full { victim(&state.open) } else { None };
        let victim = at.map(|at| state.open.remove(at));
        state.open.push(new);
        victim
    }
}

/// The oldest connection of the peer that has most. IPv6 peers are told by their /64: one host owns all of it.
fn victim(open: &[Open]) -> Option<usize> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for connection in open {
        *counts.entry(site(connection.peer)).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    open.iter()
        .position(|c| counts.get(&site(c.peer)) == Some(&most))
}

fn site(peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V4(_) => peer,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
    }
}

impl Ticket {
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self
            .connections
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.open.retain(|c| c.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(peers: &[&str]) -> Vec<Open> {
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        let open = |(id, peer): (usize, &&str)| Open {
            id: u64::try_from(id).unwrap(),
            peer: peer.parse().unwrap(),
            task: task.clone(),
        };
        peers.iter().enumerate().map(open).collect()
    }

    #[tokio::test]
    async fn who_has_most_makes_room() {
        assert_eq!(
            victim(&opened(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2"])),
            Some(1)
        );
        assert_eq!(
            victim(&opened(&["10.0.0.1", "10.0.0.2"])),
            Some(0),
            "the oldest of all"
        );
        let one_site = [
            "::1",
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8::3:1",
            "10.0.0.1",
            "10.0.0.1",
        ];
        assert_eq!(victim(&opened(&one_site)), Some(1), "a /64 is one peer");
        assert_eq!(victim(&[]), None);
    }

    #[tokio::test]
    async fn there_are_never_more_than_so_many() {
        let connections = Connections::default();
        let mut tickets = Vec::new();
        let mut tasks = Vec::new();
        for _ in 0..MAX * 2 {
            let ticket = connections.ticket();
            let task = tokio::spawn(std::future::pending::<()>());
            connections.enter(
                ticket.id(),
                IpAddr::from([127, 0, 0, 1]),
                task.abort_handle(),
            );
            tickets.push(ticket);
            tasks.push(task);
        }
        let open = connections.0.lock().unwrap().open.len();
        assert_eq!(open, MAX);
        let (old, new) = tasks.split_at_mut(MAX);
        for task in old {
            assert!(
                task.await.unwrap_err().is_cancelled(),
                "the older half was ended"
            );
        }
        assert!(new.iter().all(|t| !t.is_finished()));
        drop(tickets);
        assert_eq!(connections.0.lock().unwrap().open.len(), 0);
    }
}
