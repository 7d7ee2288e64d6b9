//! What happened to a pod, for whoever looks after it: counted, logged and, where somebody should look, an event on the pod.

use super::{Live, reference};
use crate::{
    admin::{
        Metrics,
        labels::{By, Outcome, RepairKind, Stage, UnenrolReason},
    },
    model::keys,
    reconcile::world::{Notice, Target},
    watch::{self, Kind},
};

impl Live {
    /// Says it, once.
    pub(super) fn say_and_count(&self, target: &Target, notice: Notice) {
        let (kind, reason, action, note) = match notice {
            Notice::Enrolled(took) => {
                Metrics::observe(&self.metrics.enrol_duration, &By(Stage::Total), took);
                self.metrics
                    .enrolments
                    .get_or_create(&By(Outcome::Success))
                    .inc();
                tracing::info!(pod = %target, uid = %target.uid, "in the mesh");
                return;
            }
            Notice::Unenrolled => {
                self.metrics
                    .unenrolments
                    .get_or_create(&By(UnenrolReason::NotWanted))
                    .inc();
                tracing::info!(pod = %target, uid = %target.uid, "out of the mesh");
                return;
            }
            Notice::Ended => {
                self.metrics
                    .unenrolments
                    .get_or_create(&By(UnenrolReason::Gone))
                    .inc();
                tracing::info!(pod = %target, uid = %target.uid, "ended, and let go");
                return;
            }
            Notice::Repaired(what) => {
                self.repaired(what.kind);
                (
                    Kind::Warning,
                    "CulvertRepaired",
                    "Repair",
                    format!("capture was repaired: {what}"),
                )
            }
            Notice::PutBack(what) => {
                let what: Vec<&str> = what.iter().map(|r| r.what.as_str()).collect();
                let note = format!(
                    "what is ours in the pod's network namespace was taken away or changed by somebody, and is as it was: {}",
                    what.join("; ")
                );
                (Kind::Warning, "CulvertRepaired", "Repair", note)
            }
            Notice::Relistened => {
                self.repaired(RepairKind::Listeners);
                let note = "ztunnel listened in the pod before the kernel's side could see it: its listeners were fetched \
                            from its process";
                // Nothing is wrong where a pod was ztunnel's before it was ours.
                let kind = Kind::Normal;
                (kind, "CulvertRepaired", "Repair", note.to_owned())
            }
            Notice::Reannotated => {
                self.repaired(RepairKind::Annotation);
                let note = format!(
                    "somebody removed the annotation {}, without which peers send plaintext: it is written again",
                    keys::REDIRECTION
                );
                (Kind::Warning, "CulvertRepaired", "Repair", note)
            }
            Notice::Failed(failure) => {
                let (outcome, then) = match failure.retry {
                    true => (
                        Outcome::Retry,
                        "it is tried again, with growing pauses of up to a minute",
                    ),
                    false => (
                        Outcome::Failure,
                        "it is tried again when the pod or its settings change",
                    ),
                };
                self.metrics.enrolments.get_or_create(&By(outcome)).inc();
                (
                    Kind::Warning,
                    "CulvertEnrolmentFailed",
                    "Enrol",
                    format!("{failure}; {then}"),
                )
            }
            Notice::Refused(why) => (Kind::Warning, "CulvertRefused", "Enrol", why),
            Notice::CutOff(why) => (Kind::Warning, "CulvertNetworkPolicy", "Enrol", why),
            Notice::Ignored(why) => (Kind::Warning, "CulvertIgnored", "Enrol", why),
        };
        tracing::warn!(pod = %target, uid = %target.uid, reason, "{note}");
        self.source.event(watch::Notice {
            about: watch::About::Pod(reference(target)),
            kind,
            reason,
            action,
            note,
        });
    }
}
