//! Cilium's ConfigMap, followed: read anew when it changes, gone when it is gone.
//!
//! Judges nothing; [`crate::plan::cilium`] does.

use k8s_openapi::api::core::v1::ConfigMap;
use tokio::sync::watch;

use super::follow::Sink;
use crate::plan::cilium::{self, Settings};

/// What is known of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Cilium {
    /// It has not been looked for yet.
    #[default]
    Unknown,
    /// There is none.
    Absent,
    /// It says this.
    Configured(Settings),
}

/// Where it goes.
pub(super) struct Keep {
    to: watch::Sender<Cilium>,
    list: Cilium,
}

impl Keep {
    pub(super) fn new(to: watch::Sender<Cilium>) -> Self {
        Self {
            to,
            list: Cilium::Absent,
        }
    }

    fn set(&self, now: Cilium) {
        self.to.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
    }
}

fn configured(map: ConfigMap) -> Cilium {
    Cilium::Configured(cilium::settings(map.data.unwrap_or_default()))
}

impl Sink for Keep {
    type Object = ConfigMap;

    fn begin(&mut self) {
        self.list = Cilium::Absent;
    }

    fn listed(&mut self, object: ConfigMap) {
        self.list = configured(object);
    }

    fn complete(&mut self) {
        let list = std::mem::take(&mut self.list);
        self.set(list);
    }

    fn changed(&mut self, object: ConfigMap) -> bool {
        let new = !matches!(*self.to.borrow(), Cilium::Configured(_));
        self.set(configured(object));
        new
    }

    fn gone(&mut self, _: ConfigMap) {
        self.set(Cilium::Absent);
    }
}
