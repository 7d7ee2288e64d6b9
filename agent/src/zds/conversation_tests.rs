//! Times of a conversation, to the millisecond, which no real socket shows.

use prost::Message as _;

use super::*;
use crate::zds::{messages::Ack, terms::Workload};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Patience = Patience {
    hello: Duration::from_secs(5),
    ack: Duration::from_secs(5),
    retry: (Duration::from_secs(5), Duration::from_secs(60)),
};

type Pods = BTreeMap<PodUid, Wanted<()>>;

fn pods(generation: u64) -> Pods {
    let workload = Workload {
        name: "n".into(),
        namespace: "ns".into(),
        service_account: "sa".into(),
    };
    let pod = Wanted {
        workload,
        netns: Some(()),
        generation: Generation(generation),
        awaited: false,
    };
    BTreeMap::from([(PodUid::from("a"), pod)])
}

fn hello(version: i32) -> Vec<u8> {
    ZdsHello { version }.encode_to_vec()
}

fn answer(error: &str) -> Vec<u8> {
    let ack = Some(Ack {
        error: error.into(),
    });
    WorkloadResponse { ack }.encode_to_vec()
}

/// Past an empty snapshot.
fn synced(now: Instant) -> Conversation {
    let mut conversation = Conversation::new(PATIENCE, now);
    conversation.hear(&hello(1), now).unwrap();
    let step = conversation.next(&Pods::new(), true, true, now);
    assert!(matches!(step, Step::Send(Message::SnapshotSent, _)));
    conversation.hear(&answer(""), now).unwrap();
    conversation
}

#[test]
fn a_hello_has_its_time_and_its_version() {
    let start = Instant::now();
    let mut conversation = Conversation::new(PATIENCE, start);
    let until = start + PATIENCE.hello;
    let mut next = |now| conversation.next(&Pods::new(), true, true, now);
    assert_eq!(next(start), Step::Wait(Some(until)));
    assert_eq!(next(until), Step::Close(Reason::NoHello(PATIENCE.hello)));
    let mut conversation = Conversation::new(PATIENCE, start);
    let heard = conversation.hear(&hello(0), start);
    assert_eq!(heard, Err(Reason::Version(0)));
}

#[test]
fn an_ack_at_the_deadline_is_late_whoever_looks_first() {
    let start = Instant::now();
    let late = Reason::Late {
        said: "Add of pod a".into(),
        after: PATIENCE.ack,
    };
    let asked = || {
        let mut conversation = synced(start);
        conversation.touch(&PodUid::from("a"));
        let step = conversation.next(&pods(1), true, true, start);
        assert!(
            matches!(step, Step::Send(Message::Add { .. }, until) if until == start + PATIENCE.ack)
        );
        conversation
    };
    let deadline = start + PATIENCE.ack;
    let mut conversation = asked();
    assert_eq!(conversation.hear(&answer(""), deadline), Err(late.clone()));
    // Who waits for it is still to be found.
    assert_eq!(conversation.adding(), Some(Generation(1)));
    let mut conversation = asked();
    let step = conversation.next(&pods(1), true, true, deadline);
    assert_eq!(step, Step::Close(late));
    let just_in_time = deadline - Duration::from_millis(1);
    assert!(matches!(
        asked().hear(&answer(""), just_in_time),
        Ok(Heard::Ack(_))
    ));
}

#[test]
fn what_is_refused_is_said_again_ever_more_seldom_until_it_works() {
    let mut now = Instant::now();
    let mut conversation = synced(now);
    conversation.touch(&PodUid::from("a"));
    for pause in [5, 10, 20, 40, 60, 60] {
        let step = conversation.next(&pods(1), true, true, now);
        assert!(
            matches!(step, Step::Send(Message::Add { .. }, _)),
            "{step:?}"
        );
        conversation.hear(&answer("no"), now).unwrap();
        let again = now + SECOND * pause;
        let step = conversation.next(&pods(1), true, true, now);
        assert_eq!(step, Step::Wait(Some(again)), "{pause}");
        assert_eq!(conversation.tally(), (0, 1));
        now = again;
    }
    let step = conversation.next(&pods(1), true, true, now);
    assert!(
        matches!(step, Step::Send(Message::Add { .. }, _)),
        "{step:?}"
    );
    conversation.hear(&answer(""), now).unwrap();
    assert_eq!(
        conversation.next(&pods(1), true, true, now),
        Step::Wait(None)
    );
    assert_eq!(conversation.tally(), (1, 0));
}

#[test]
fn a_call_need_not_wait_for_the_time_of_a_retry() {
    let now = Instant::now();
    let mut conversation = synced(now);
    let uid = PodUid::from("a");
    conversation.touch(&uid);
    conversation.next(&pods(1), true, true, now);
    conversation.hear(&answer("no"), now).unwrap();
    conversation.touch_now(&uid);
    let step = conversation.next(&pods(1), true, true, now);
    assert!(
        matches!(step, Step::Send(Message::Add { .. }, _)),
        "{step:?}"
    );
}

#[test]
fn a_refused_namespace_is_taken_back_before_another_is_named() {
    let now = Instant::now();
    let mut conversation = synced(now);
    let uid = PodUid::from("a");
    conversation.touch(&uid);
    conversation.next(&pods(1), true, true, now);
    conversation.hear(&answer("no"), now).unwrap();
    conversation.touch_now(&uid);
    let step = conversation.next(&pods(2), true, true, now);
    assert!(
        matches!(step, Step::Send(Message::Del { .. }, _)),
        "{step:?}"
    );
    conversation.hear(&answer(""), now).unwrap();
    let step = conversation.next(&pods(2), true, true, now);
    assert!(
        matches!(step, Step::Send(Message::Add { .. }, _)),
        "{step:?}"
    );
}
