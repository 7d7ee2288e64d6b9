//! When a pod is said, by a condition, not to be in the mesh though it asks for it.
//!
//! Pure. What passes by itself in a moment is not worth two writes to the API server.

use crate::model::Uncaptured;

/// So many tries, some eight seconds, may fail without a word.
const TRIES: u32 = 5;

/// Why a pod is not in the mesh, as far as is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle<'a> {
    /// It is of a kind that cannot be served.
    Refused(&'a str),
    /// It was tried in vain.
    Failed {
        /// What happened last.
        why: &'a str,
        /// How often in a row.
        tries: u32,
        /// The same may succeed later.
        retry: bool,
    },
}

/// What the pod's condition is to say; none where it is to have none.
#[must_use]
pub fn wanted(obstacle: Option<Obstacle<'_>>) -> Option<Uncaptured> {
    let (reason, message) = match obstacle? {
        Obstacle::Refused(why) => (Uncaptured::REFUSED, why),
        Obstacle::Failed { why, tries, retry } if tries >= TRIES || !retry => {
            (Uncaptured::FAILING, why)
        }
        Obstacle::Failed { .. } => return None,
    };
    Some(Uncaptured {
        reason: reason.to_owned(),
        message: message.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_said_and_what_passes_is_not() {
        let failed = |tries, retry| {
            let why = "no ztunnel";
            wanted(Some(Obstacle::Failed { why, tries, retry })).map(|c| c.reason)
        };
        assert_eq!(wanted(None), None);
        assert_eq!(failed(1, true), None);
        assert_eq!(failed(4, true), None);
        assert_eq!(failed(5, true).as_deref(), Some("Failing"));
        assert_eq!(failed(1, false).as_deref(), Some("Failing"));
        let refused = wanted(Some(Obstacle::Refused("gVisor"))).unwrap();
        assert_eq!(
            (refused.reason.as_str(), refused.message.as_str()),
            ("Refused", "gVisor")
        );
    }
}
