//! The shared picture of the cluster: changed in place, observed through a `tokio::sync::watch` channel, never copied.
//!
//! Receivers are woken only by what really changed. Nothing here talks to anybody.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::model::{Cluster, Namespace, NetworkPolicy, Pod, PodUid};

/// The writing end.
#[derive(Clone, Debug)]
pub struct View {
    cluster: watch::Sender<Cluster>,
    missing: Arc<Mutex<Missing>>,
}

/// What has never been listed yet.
#[derive(Debug)]
struct Missing {
    pods: bool,
    namespaces: bool,
    opt_in: usize,
}

impl View {
    /// An empty view whose opt-ins come from that many lists.
    #[must_use]
    pub fn new(opt_in_lists: usize) -> Self {
        let cluster = Cluster {
            opted_in_listed: opt_in_lists == 0,
            ..Cluster::default()
        };
        Self {
            cluster: watch::Sender::new(cluster),
            missing: Arc::new(Mutex::new(Missing {
                pods: true,
                namespaces: true,
                opt_in: opt_in_lists,
            })),
        }
    }

    /// A reading end: `borrow()` it for as short as possible, `changed()` tells when to look again.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Cluster> {
        self.cluster.subscribe()
    }

    /// A pod as it is now; true if it was not there.
    pub fn set_pod(&self, pod: Pod) -> bool {
        let mut new = false;
        self.cluster.send_if_modified(|c| {
            new = !c.pods.contains_key(&pod.uid);
            set(&mut c.pods, pod.uid.clone(), pod)
        });
        new
    }

    /// A pod that is gone.
    pub fn remove_pod(&self, uid: &PodUid) {
        self.cluster
            .send_if_modified(|c| c.pods.remove(uid).is_some());
    }

    /// All pods there are.
    pub fn replace_pods(&self, pods: BTreeMap<PodUid, Pod>) {
        let mut missing = self.lock();
        missing.pods = false;
        let listed = missing.listed();
        self.cluster.send_if_modified(|c| {
            let replaced = replace(&mut c.pods, pods);
            replaced | raise(&mut c.listed, listed)
        });
    }

    /// A namespace as it is now; true if it was not there.
    pub fn set_namespace(&self, name: String, namespace: Namespace) -> bool {
        let mut new = false;
        self.cluster.send_if_modified(|c| {
            new = !c.namespaces.contains_key(&name);
            set(&mut c.namespaces, name, namespace)
        });
        new
    }

    /// A namespace that is gone.
    pub fn remove_namespace(&self, name: &str) {
        self.cluster
            .send_if_modified(|c| c.namespaces.remove(name).is_some());
    }

    /// All namespaces there are.
    pub fn replace_namespaces(&self, namespaces: BTreeMap<String, Namespace>) {
        let mut missing = self.lock();
        missing.namespaces = false;
        let listed = missing.listed();
        self.cluster.send_if_modified(|c| {
            let replaced = replace(&mut c.namespaces, namespaces);
            replaced | raise(&mut c.listed, listed)
        });
    }

    /// How many pods more, or fewer, ask for the mesh in each of these namespaces. `first` when a list has been read
    /// for the first time.
    pub fn change_opted_in(&self, changes: HashMap<String, isize>, first: bool) {
        let mut missing = self.lock();
        if first {
            missing.opt_in = missing.opt_in.saturating_sub(1);
        }
        let listed = missing.opt_in == 0;
        self.cluster.send_if_modified(|c| {
            let mut changed = raise(&mut c.opted_in_listed, listed);
            for (namespace, change) in changes {
                let before = c.opted_in.get(&namespace).copied().unwrap_or(0);
                let now = before.saturating_add_signed(change);
                changed |= now != before;
                if now == 0 {
                    c.opted_in.remove(&namespace);
                } else {
                    c.opted_in.insert(namespace, now);
                }
            }
            changed
        });
    }

    /// All pods there are that may ask for the mesh, counted by namespace.
    pub fn replace_opted_in(&self, counts: BTreeMap<String, usize>) {
        self.lock().opt_in = 0;
        self.cluster.send_if_modified(|c| {
            let replaced = replace(&mut c.opted_in, counts);
            replaced | raise(&mut c.opted_in_listed, true)
        });
    }

    /// A policy as it is now; true if it was not there.
    pub fn set_policy(&self, namespace: String, name: String, policy: NetworkPolicy) -> bool {
        let mut new = false;
        self.cluster.send_if_modified(|c| {
            let of_namespace = c.policies.entry(namespace).or_default();
            new = !of_namespace.contains_key(&name);
            set(of_namespace, name, policy)
        });
        new
    }

    /// A policy that is gone.
    pub fn remove_policy(&self, namespace: &str, name: &str) {
        self.cluster.send_if_modified(|c| {
            let Some(of_namespace) = c.policies.get_mut(namespace) else {
                return false;
            };
            let removed = of_namespace.remove(name).is_some();
            if of_namespace.is_empty() {
                c.policies.remove(namespace);
            }
            removed
        });
    }

    /// All policies there are.
    pub fn replace_policies(&self, policies: BTreeMap<String, BTreeMap<String, NetworkPolicy>>) {
        self.cluster
            .send_if_modified(|c| replace(&mut c.policies, policies));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Missing> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Missing {
    fn listed(&self) -> bool {
        !self.pods && !self.namespaces
    }
}

fn set<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, V>, key: K, value: V) -> bool {
    if map.get(&key) == Some(&value) {
        return false;
    }
    map.insert(key, value);
    true
}

fn replace<K: Ord + Hash, V: PartialEq>(map: &mut BTreeMap<K, V>, new: BTreeMap<K, V>) -> bool {
    if *map == new {
        return false;
    }
    drop(mem::replace(map, new));
    true
}

/// Sets a flag that never falls again.
fn raise(flag: &mut bool, to: bool) -> bool {
    let raised = to && !*flag;
    *flag |= to;
    raised
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_wakes_a_reader() {
        let view = View::new(1);
        let mut reader = view.subscribe();
        view.replace_pods(BTreeMap::new());
        assert!(!reader.has_changed().unwrap());
        view.replace_namespaces(BTreeMap::new());
        assert!(reader.has_changed().unwrap() && reader.borrow_and_update().listed);

        assert!(view.set_namespace("a".into(), Namespace::default()));
        assert!(reader.has_changed().unwrap());
        reader.mark_unchanged();
        assert!(!view.set_namespace("a".into(), Namespace::default()));
        view.remove_namespace("b");
        view.replace_namespaces([("a".into(), Namespace::default())].into());
        assert!(!reader.has_changed().unwrap());
    }

    #[test]
    fn opt_ins_are_counted_over_all_lists() {
        let view = View::new(2);
        let changes = |list: &[(&str, isize)]| {
            let list = list.iter().map(|(n, c)| ((*n).to_owned(), *c));
            list.collect::<HashMap<_, _>>()
        };
        view.change_opted_in(changes(&[("a", 2)]), true);
        assert!(!view.subscribe().borrow().opted_in_listed);
        view.change_opted_in(changes(&[("a", 1), ("b", 1)]), true);
        assert!(view.subscribe().borrow().opted_in_listed);
        view.change_opted_in(changes(&[("a", -1), ("b", -1)]), false);
        let counts = view.subscribe().borrow().opted_in.clone();
        assert_eq!(counts, [("a".to_owned(), 2)].into());
    }
}
