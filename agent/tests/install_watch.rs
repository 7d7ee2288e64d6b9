//! The installer kept running beside other programs that write, rename and remove.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

mod scratch;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert::install::{Installer, Mode, State, Status};
use scratch::Scratch;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

const LIST: &str =
    "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"bridge\"}]}\n";

struct Running {
    status: watch::Receiver<Status>,
    _stop: DropGuard,
}

fn run(scratch: &Scratch, mode: Mode) -> Running {
    let (sender, status) = watch::channel(Status::default());
    let stop = CancellationToken::new();
    let installer = Arc::new(Installer::new(scratch.options(mode)));
    tokio::spawn(installer.watch(sender, stop.clone()));
    Running {
        status,
        _stop: stop.drop_guard(),
    }
}

impl Running {
    async fn until(&mut self, wanted: impl Fn(&Status) -> bool) -> Status {
        let limit = Duration::from_secs(30);
        let found = tokio::time::timeout(limit, self.status.wait_for(|s| wanted(s))).await;
        let found = found.map(|status| status.unwrap().clone());
        found.unwrap_or_else(|_| panic!("never: {:?}", self.status.borrow()))
    }

    async fn installed(&mut self) -> Status {
        self.until(|s| matches!(s.state, State::Installed { .. }))
            .await
    }
}

/// How long until it holds.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}

fn has_entry(scratch: &Scratch, name: &str) -> bool {
    fs::read_to_string(scratch.conf(name)).is_ok_and(|t| t.contains("culvert-cni"))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_a_configuration_and_takes_the_first_that_comes() {
    let scratch = Scratch::new("watch-wait");
    let mut running = run(&scratch, Mode::Auto);
    let status = running.until(|s| matches!(&s.state, State::Waiting { reason } if reason.contains("no CNI configuration"))).await;
    assert_eq!(status.installs, 0);
    scratch.put("10-a.conflist", LIST);
    let status = running.installed().await;
    assert!(has_entry(&scratch, "10-a.conflist"));
    assert_eq!((status.installs, status.healed), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_cni_does_is_undone_within_a_second() {
    let scratch = Scratch::new("watch-heal");
    scratch.put_real("cilium");
    let own = "00-culvert.conflist";
    let mut running = run(&scratch, Mode::Auto);
    running.installed().await;
    let plugin = scratch.root.join("bin/culvert-cni");
    let mut took = Vec::new();
    // Cilium at its start, not exclusive: writes its own file anew. The copy follows.
    let newer = scratch.read("05-cilium.conflist").replace("false", "true");
    scratch.put("05-cilium.conflist", &newer);
    took.push(
        eventually("the copy follows", || {
            scratch.read(own).contains("\"enable-debug\": true")
        })
        .await,
    );
    // Exclusive: puts ours aside.
    fs::rename(
        scratch.conf(own),
        scratch.conf(&format!("{own}.cilium_bak")),
    )
    .unwrap();
    took.push(eventually("the list is back", || has_entry(&scratch, own)).await);
    // Somebody cleans up the plugins.
    fs::remove_file(&plugin).unwrap();
    took.push(eventually("the plugin is back", || plugin.exists()).await);
    // Somebody removes the list.
    fs::remove_file(scratch.conf(own)).unwrap();
    took.push(eventually("the list is back", || has_entry(&scratch, own)).await);
    println!("mended after {took:?}");
    // One that a busy machine has kept waiting is no rule.
    took.sort_unstable();
    assert!(took[took.len() / 2] < Duration::from_secs(1), "{took:?}");
    eventually("what was put aside is gone", || {
        !scratch.conf(&format!("{own}.cilium_bak")).exists()
    })
    .await;
    let status = running.until(|s| s.healed >= 4).await;
    assert!(
        matches!(status.state, State::Installed { .. }),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chained_file_is_mended_whichever_way_it_is_written() {
    let scratch = Scratch::new("watch-chained");
    scratch.put("10-a.conflist", LIST);
    let mut running = run(&scratch, Mode::Chained);
    running.installed().await;
    // In place, in two steps with a pause: the entry must not move to the next file meanwhile.
    scratch.put("20-b.conflist", LIST);
    scratch.put("10-a.conflist", &LIST[..20]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!has_entry(&scratch, "20-b.conflist"));
    scratch.put("10-a.conflist", LIST);
    eventually("the entry is back", || has_entry(&scratch, "10-a.conflist")).await;
    // By rename.
    let temp = scratch.conf("x.tmp");
    fs::write(&temp, LIST).unwrap();
    fs::rename(temp, scratch.conf("10-a.conflist")).unwrap();
    eventually("the entry is back", || has_entry(&scratch, "10-a.conflist")).await;
    // Gone for good: the next one counts.
    fs::remove_file(scratch.conf("10-a.conflist")).unwrap();
    eventually("the entry moves on", || {
        has_entry(&scratch, "20-b.conflist")
    })
    .await;
    // A broken file for longer is passed over, as runtimes do.
    scratch.put("10-a.conflist", "{");
    running.installed().await;
    assert!(has_entry(&scratch, "20-b.conflist"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_works_against_us_is_named() {
    let scratch = Scratch::new("watch-contested");
    let theirs = LIST.replace("bridge", "calico");
    scratch.put("10-calico.conflist", &theirs);
    let mut running = run(&scratch, Mode::Chained);
    running.installed().await;
    let stop = CancellationToken::new();
    let other = {
        let (path, stop) = (scratch.conf("10-calico.conflist"), stop.clone());
        tokio::spawn(async move {
            while !stop.is_cancelled() {
                fs::write(&path, &theirs).unwrap();
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        })
    };
    let status = running
        .until(|s| matches!(s.state, State::Contested { .. }))
        .await;
    let State::Contested { by } = status.state else {
        unreachable!("waited for it");
    };
    assert!(
        by.contains("Calico") && by.contains("10-calico.conflist"),
        "{by}"
    );
    assert!(status.healed > 5, "{}", status.healed);
    stop.cancel();
    other.await.unwrap();
    // However it went, the last word is ours.
    eventually("the entry is back", || {
        has_entry(&scratch, "10-calico.conflist")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_ours_does_not_outlive_its_original() {
    let scratch = Scratch::new("watch-orphan");
    scratch.put_real("cilium");
    let mut running = run(&scratch, Mode::Auto);
    running.installed().await;
    let theirs = scratch.read("05-cilium.conflist");
    fs::remove_file(scratch.conf("05-cilium.conflist")).unwrap();
    running
        .until(|s| matches!(s.state, State::Waiting { .. }))
        .await;
    eventually("the copy goes", || {
        !scratch.conf("00-culvert.conflist").exists()
    })
    .await;
    scratch.put("05-cilium.conflist", theirs);
    running.installed().await;
    assert!(has_entry(&scratch, "00-culvert.conflist"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_edited_is_said_and_tried_again() {
    let scratch = Scratch::new("watch-failed");
    scratch.put("10-a.conflist", LIST.replace("1.0.0", "0.2.0"));
    let mut running = run(&scratch, Mode::Auto);
    let status = running
        .until(|s| matches!(s.state, State::Failed { .. }))
        .await;
    let State::Failed { error } = &status.state else {
        unreachable!("waited for it");
    };
    assert!(
        error.contains("10-a.conflist") && error.contains("0.2.0"),
        "{error}"
    );
    assert!(status.configuration_failures > 0);
    scratch.put("10-a.conflist", LIST);
    running.installed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_comes_late_or_anew_is_noticed() {
    let scratch = Scratch::new("watch-dir");
    let dir = scratch.root.join("net.d");
    fs::remove_dir(&dir).unwrap();
    let mut running = run(&scratch, Mode::Auto);
    running
        .until(|s| matches!(&s.state, State::Waiting { reason } if reason.contains("no CNI")))
        .await;
    fs::create_dir(&dir).unwrap();
    scratch.put("10-a.conflist", LIST);
    running.installed().await;
    fs::rename(&dir, scratch.root.join("old")).unwrap();
    fs::create_dir(&dir).unwrap();
    scratch.put("10-a.conflist", LIST);
    eventually("the entry is in the new directory", || {
        has_entry(&scratch, "10-a.conflist")
    })
    .await;
}
