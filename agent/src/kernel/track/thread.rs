//! The tracker of the daemon: a thread that watches the pods it is told of and says what it did.
//!
//! It sleeps in one poll(2) over all subscriptions and a wake-up of its own; with nothing to do it wakes once a second
//! for a slice of the sysctls, and not at all without pods.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Event, Watchlist};
use crate::kernel::{
    ears::Ears,
    error::{Error, Result},
    netns::{Netns, NetnsCookie},
    node::Node,
};

#[derive(Debug)]
enum Command {
    Watch(Arc<Netns>, Option<Ears>),
    Forget(NetnsCookie),
    Stop,
}

#[derive(Debug)]
struct Shared {
    commands: Mutex<Vec<Command>>,
    wake: EventFd,
}

impl Shared {
    fn send(&self, command: Command) {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(command);
        // Only a counter that is full can refuse, and then the thread is awake.
        let _awake = self.wake.write(1);
    }

    fn take(&self) -> Vec<Command> {
        // Non-blocking: nothing to read means that another wake-up brought us here.
        let _none = self.wake.read();
        std::mem::take(&mut *self.commands.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Watches pods on a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct Tracker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Tracker {
    /// Starts the thread, in the calling thread's network namespace. `tell` is called on it, for each thing that
    /// happened; while it does not return nothing is watched.
    pub fn start(node: Arc<Node>, mut tell: impl FnMut(Event) + Send + 'static) -> Result<Self> {
        const OPERATION: &str = "start";
        const OBJECT: &str = "the tracker's thread";
        let fail = |e: io::Error| Error::system(OPERATION, OBJECT, e);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            commands: Mutex::default(),
            wake: EventFd::from_flags(flags).map_err(|e| fail(e.into()))?,
        });
        let commands = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("tracker".to_owned())
            .spawn(move || {
                let mut list = Watchlist::new();
                while carry_out(&mut list, commands.take()) {
                    list.answer(&node, &mut tell);
                    list.wait(Some(commands.wake.as_fd()), None);
                }
            })
            .map_err(fail)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Watches an enrolled pod from now on, and brings it up to date first. Keeps its namespace alive until
    /// [`Tracker::forget`].
    pub fn watch(&self, netns: Arc<Netns>) {
        self.shared.send(Command::Watch(netns, None));
    }

    /// Watches a pod that was enrolled just now and has been listened to since.
    pub fn take_over(&self, netns: Arc<Netns>, ears: Ears) {
        self.shared.send(Command::Watch(netns, Some(ears)));
    }

    /// Lets go of a pod.
    pub fn forget(&self, cookie: NetnsCookie) {
        self.shared.send(Command::Forget(cookie));
    }

    /// False once the thread has died: pods are not followed any more.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.shared.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of `tell` was printed when it happened.
            let _panicked = thread.join();
        }
    }
}

/// False when it is time to stop.
fn carry_out(list: &mut Watchlist, commands: Vec<Command>) -> bool {
    for command in commands {
        match command {
            Command::Watch(netns, ears) => list.add(netns, ears),
            Command::Forget(cookie) => drop(list.pods.remove(&cookie)),
            Command::Stop => return false,
        }
    }
    true
}
