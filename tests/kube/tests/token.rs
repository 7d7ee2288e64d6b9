//! A token that is replaced, in time or too late: the agent goes on with the new one from the next request on, keeps what
//! it knows while it has none that counts, and says whose fault it is.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{fs, path::PathBuf, time::Duration};

use culvert::watch::Standing;
use culvert_cluster::IN_TIME;
use culvert_kube_tests::{Bed, HOME, NODE, eventually, find, logs};
use serde_json::json;

/// Longest pause between two tries of a watch, and a loaded machine.
const SOON: Duration = Duration::from_secs(15);

/// The file that the kubeconfig names, written as the kubelet does it: another file takes its name.
fn replace(bed: &Bed, token: &str) {
    let path = token_file(bed);
    let new = path.with_extension("new");
    fs::write(&new, token).unwrap();
    fs::rename(&new, &path).unwrap();
}

fn token_file(bed: &Bed) -> PathBuf {
    bed.kubeconfig.with_extension("token")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_replaced_in_time_and_too_late() {
    logs();
    let bed = Bed::start("token").await.unwrap();
    let (namespace, account) = HOME;
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "first", NODE, json!({})).await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("listed", |c| c.listed && find(c, "test", "first").is_some())
        .await
        .unwrap();

    // In time: nobody notices.
    let old = fs::read_to_string(token_file(&bed)).unwrap();
    let fresh = bed.plane.token_for(namespace, account).unwrap();
    assert_ne!(old, fresh);
    replace(&bed, &fresh);
    w.api.get_pod("test", "first").await.unwrap().unwrap();
    assert_eq!(w.api.stats().interruptions.get(), 0);

    // Revoked: a service account of the same name is another, and the tokens of the one before are void.
    bed.plane
        .kubectl(&[
            "delete",
            "serviceaccount",
            account,
            "-n",
            namespace,
            IN_TIME,
        ])
        .unwrap();
    bed.plane
        .kubectl(&["create", "serviceaccount", account, "-n", namespace])
        .unwrap();
    eventually("the old token is refused", || async {
        Ok(match w.api.get_pod("test", "first").await {
            Err(e) if e.code == 401 => {
                assert!(e.to_string().contains("refuses the agent's token"), "{e}");
                true
            }
            _ => false,
        })
    })
    .await
    .unwrap();
    // All watches end and have to begin anew, with a token that does not count.
    tokio::task::block_in_place(|| {
        bed.plane.stop_api_server().unwrap();
        bed.plane.start_api_server().unwrap();
    });
    bed.pod("test", "second", NODE, json!({})).await.unwrap();
    eventually("the watches are refused", || async {
        let refused = w.api.get_pod("test", "first").await;
        Ok(w.api.stats().interruptions.get() >= 3 && refused.is_err_and(|e| e.code == 401))
    })
    .await
    .unwrap();
    assert!(
        w.find("test", "first").is_some(),
        "what was known stays known"
    );
    assert!(w.find("test", "second").is_none());

    // A new one: the first request after it goes through, the watches follow.
    replace(&bed, &bed.plane.token_for(namespace, account).unwrap());
    w.api.get_pod("test", "second").await.unwrap().unwrap();
    let seen = w
        .within("what was missed", SOON, |c| {
            find(c, "test", "second").is_some()
        })
        .await
        .unwrap();
    println!("the watch went on {seen:?} after the new token");
    let standing = w.api.standing(namespace, "culvert").await;
    assert!(
        matches!(&standing, Standing::Removed(why) if why.contains("DaemonSet")),
        "the account counts as gone no more: {standing:?}"
    );

    // Gone for a moment: the last one is used on.
    fs::remove_file(token_file(&bed)).unwrap();
    w.api.get_pod("test", "second").await.unwrap().unwrap();
}
