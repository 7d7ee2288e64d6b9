//! One pod's next step: from what is wished and what is so to the one thing to do now.
//!
//! Called again after each step, so the order of enrolment and of letting go is written down here and nowhere else.
//! Pure: time, retries and the doing belong to [`crate::reconcile`].

use crate::model::Redirection;

/// What a pod is meant to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Not decided yet: whatever is, stays.
    Keep,
    /// In the mesh.
    In,
    /// Alive and out of the mesh.
    Out,
    /// Ended for good (a Job), and still shown: nothing of it needs capture or undoing, but it is not to be advertised.
    Ended,
    /// Gone: nothing of it needs capture or undoing.
    Gone,
}

/// What the kernel does with the pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kernel {
    /// Nothing, as far as is known.
    #[default]
    Out,
    /// It captures, but not as wished, or not whole.
    Stale,
    /// It captures as wished.
    In,
    /// New connections go direct, old ones still need our rules.
    Draining,
    /// New connections go direct, no old one is left; what peers that have not heard yet send by ztunnel is still
    /// delivered.
    Released,
}

/// What ztunnel knows of the pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ztunnel {
    /// Nothing.
    #[default]
    Untold,
    /// It was told and has not acknowledged.
    Waiting,
    /// It serves the pod.
    Acked,
    /// It served the pod, and no ztunnel is left: the next one is told of all pods when it comes.
    Away,
}

/// What is so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// The pod's network namespace is known.
    pub placed: bool,
    /// The kernel's side.
    pub kernel: Kernel,
    /// ztunnel's side.
    pub ztunnel: Ztunnel,
    /// The annotation, as last seen or written.
    pub annotation: Option<Redirection>,
    /// The annotation cannot be written now, or is not to be waited for: everything else goes on without it.
    pub mute: bool,
}

/// What to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Find the pod's network namespace.
    Find,
    /// Bring the kernel's side to what is wished.
    Attach,
    /// Tell ztunnel and wait for its acknowledgement.
    Tell,
    /// Write the annotation, or take it away.
    Annotate(Option<Redirection>),
    /// Let new connections go direct, and still deliver what comes by ztunnel.
    Release,
    /// Let go of the living pod altogether.
    Detach,
    /// Take it from ztunnel.
    Untell,
    /// Clear away what is left of a dead pod.
    Forget,
    /// Old connections still need the rules: look again later.
    Wait,
    /// Nothing to do.
    Done,
}

/// The next step for a pod.
#[must_use]
pub fn next(wish: Wish, so: Observed) -> Step {
    match wish {
        Wish::Keep => Step::Done,
        Wish::In if !so.placed => Step::Find,
        Wish::In if so.kernel != Kernel::In => Step::Attach,
        Wish::In => match (so.ztunnel, so.annotation) {
            // A pod that was served once keeps `enabled`: peers would fall back to plaintext otherwise.
            (Ztunnel::Acked | Ztunnel::Away, Some(Redirection::Enabled)) => Step::Done,
            (Ztunnel::Acked | Ztunnel::Away, _) if so.mute => Step::Done,
            (Ztunnel::Acked | Ztunnel::Away, _) => Step::Annotate(Some(Redirection::Enabled)),
            (Ztunnel::Waiting, None) if !so.mute => Step::Annotate(Some(Redirection::Pending)),
            (Ztunnel::Waiting | Ztunnel::Untold, _) => Step::Tell,
        },
        // New connections first: from here on they go direct. Peers are told next. Then ztunnel, once it carries nothing,
        // for it ends what it carries soon after; what nobody delivers to any more goes last.
        Wish::Out if matches!(so.kernel, Kernel::In | Kernel::Stale) => Step::Release,
        Wish::Out if so.annotation.is_some() && !so.mute => Step::Annotate(None),
        Wish::Out if so.kernel == Kernel::Draining => Step::Wait,
        Wish::Out if so.ztunnel != Ztunnel::Untold => Step::Untell,
        Wish::Out if so.kernel == Kernel::Released => Step::Detach,
        Wish::Out => Step::Done,
        Wish::Ended | Wish::Gone if so.kernel != Kernel::Out => Step::Forget,
        Wish::Ended | Wish::Gone if so.ztunnel != Ztunnel::Untold => Step::Untell,
        Wish::Ended if so.annotation.is_some() && !so.mute => Step::Annotate(None),
        Wish::Ended | Wish::Gone => Step::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVED: Observed = Observed {
        placed: true,
        kernel: Kernel::In,
        ztunnel: Ztunnel::Acked,
        annotation: Some(Redirection::Enabled),
        mute: false,
    };

    fn apply(so: &mut Observed, step: Step) {
        match step {
            Step::Find => so.placed = true,
            Step::Attach => so.kernel = Kernel::In,
            Step::Tell => so.ztunnel = Ztunnel::Acked,
            Step::Annotate(value) => so.annotation = value,
            Step::Release | Step::Wait => so.kernel = Kernel::Released,
            Step::Detach | Step::Forget => so.kernel = Kernel::Out,
            Step::Untell => so.ztunnel = Ztunnel::Untold,
            Step::Done => {}
        }
    }

    fn steps(wish: Wish, mut so: Observed) -> Vec<Step> {
        let mut taken = Vec::new();
        for _ in 0..20 {
            let step = next(wish, so);
            if step == Step::Done {
                return taken;
            }
            taken.push(step);
            apply(&mut so, step);
        }
        panic!("no end: {taken:?}");
    }

    #[test]
    fn a_new_pod_is_captured_before_ztunnel_hears_of_it() {
        assert_eq!(
            steps(Wish::In, Observed::default()),
            [
                Step::Find,
                Step::Attach,
                Step::Tell,
                Step::Annotate(Some(Redirection::Enabled))
            ]
        );
    }

    #[test]
    fn a_pod_without_ztunnel_is_pending_then_enabled() {
        let so = Observed {
            ztunnel: Ztunnel::Waiting,
            annotation: None,
            ..SERVED
        };
        assert_eq!(
            steps(Wish::In, so),
            [
                Step::Annotate(Some(Redirection::Pending)),
                Step::Tell,
                Step::Annotate(Some(Redirection::Enabled))
            ]
        );
    }

    #[test]
    fn a_served_pod_never_falls_back_to_pending() {
        for ztunnel in [Ztunnel::Waiting, Ztunnel::Untold] {
            let so = Observed { ztunnel, ..SERVED };
            assert_eq!(next(Wish::In, so), Step::Tell);
        }
    }

    #[test]
    fn without_any_ztunnel_a_served_pod_stays_as_it_is() {
        let away = Observed {
            ztunnel: Ztunnel::Away,
            ..SERVED
        };
        assert_eq!(next(Wish::In, away), Step::Done);
        assert_eq!(steps(Wish::Gone, away), [Step::Forget, Step::Untell]);
    }

    #[test]
    fn leaving_goes_new_connections_peers_ztunnel_rules() {
        assert_eq!(
            steps(Wish::Out, SERVED),
            [
                Step::Release,
                Step::Annotate(None),
                Step::Untell,
                Step::Detach
            ]
        );
        let draining = Observed {
            kernel: Kernel::Draining,
            ..SERVED
        };
        assert_eq!(
            steps(Wish::Out, draining),
            [Step::Annotate(None), Step::Wait, Step::Untell, Step::Detach]
        );
    }

    #[test]
    fn an_api_server_that_is_away_holds_up_nothing() {
        let mute = Observed {
            mute: true,
            ..Observed::default()
        };
        assert_eq!(
            steps(Wish::In, mute),
            [Step::Find, Step::Attach, Step::Tell]
        );
        let mute = Observed {
            ztunnel: Ztunnel::Waiting,
            mute: true,
            ..SERVED
        };
        assert_eq!(
            steps(Wish::Out, mute),
            [Step::Release, Step::Untell, Step::Detach]
        );
    }

    #[test]
    fn the_deleted_need_no_annotation_and_those_that_ended_lose_it() {
        assert_eq!(steps(Wish::Gone, SERVED), [Step::Forget, Step::Untell]);
        assert_eq!(
            steps(Wish::Ended, SERVED),
            [Step::Forget, Step::Untell, Step::Annotate(None)]
        );
        let mute = Observed {
            mute: true,
            ..SERVED
        };
        assert_eq!(steps(Wish::Ended, mute), [Step::Forget, Step::Untell]);
    }

    #[test]
    fn every_state_comes_to_rest_where_it_should() {
        let annotations = [None, Some(Redirection::Pending), Some(Redirection::Enabled)];
        for wish in [Wish::Keep, Wish::In, Wish::Out, Wish::Ended, Wish::Gone] {
            for kernel in [
                Kernel::Out,
                Kernel::Stale,
                Kernel::In,
                Kernel::Draining,
                Kernel::Released,
            ] {
                for ztunnel in [
                    Ztunnel::Untold,
                    Ztunnel::Waiting,
                    Ztunnel::Acked,
                    Ztunnel::Away,
                ] {
                    for annotation in annotations {
                        let so = Observed {
                            placed: kernel != Kernel::Out,
                            kernel,
                            ztunnel,
                            annotation,
                            mute: false,
                        };
                        let mut end = so;
                        for step in steps(wish, so) {
                            apply(&mut end, step);
                        }
                        match wish {
                            Wish::In if end.ztunnel == Ztunnel::Away => {
                                assert_eq!(end, Observed { ztunnel, ..SERVED });
                            }
                            Wish::In => assert_eq!(end, SERVED),
                            Wish::Keep => assert_eq!(end, so),
                            Wish::Out | Wish::Ended | Wish::Gone => {
                                assert_eq!(
                                    (end.kernel, end.ztunnel),
                                    (Kernel::Out, Ztunnel::Untold)
                                );
                                assert!(wish == Wish::Gone || end.annotation.is_none());
                            }
                        }
                    }
                }
            }
        }
    }
}
