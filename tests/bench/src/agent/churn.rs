//! A day's comings and goings without the pauses between them, and whether anything of it stays with the agent.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::batch::Batch;
use super::footprint::Footprint;
use super::plugin::Plugin;
use super::site::Site;
use crate::interrupt;

/// Pods that are there at the same time, beside those that stay.
const BATCH: usize = 50;
/// Of the pods so many, but not more than this, come and go before the first reading: what is made once is not what is
/// looked for, nor how an allocator's pages fill up until as many are begun as a busy moment needs.
const WARM_UP: usize = 4000;
/// What an allocator may keep: for 20,000 pods some fifty bytes each.
const SLACK_KIB: u64 = 1024;
/// What may be in use more than before, in bytes: what each thread keeps of small pieces it has freed counts as used.
const SLACK_IN_USE: f64 = 256.0 * 1024.0;
/// Threads that wait for work end after ten seconds without, and the kernel takes its time with namespaces.
const SETTLE: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_secs(12);

/// What was there before and after.
#[derive(Debug)]
pub(super) struct Churn {
    pub(super) pods: usize,
    pub(super) seconds: f64,
    pub(super) before: Footprint,
    pub(super) after: Footprint,
    /// KiB of anonymous memory on the way.
    pub(super) anonymous: Vec<u64>,
    /// Bytes of the heap in use, before and after, where the agent's allocator counts them.
    pub(super) in_use: Option<(f64, f64)>,
}

/// Adds and removes so many pods, each a new one in a new network namespace. `left` pods stay.
pub(super) fn measure(site: &Site, plugin: &Plugin, count: usize, left: usize) -> Result<Churn> {
    let warm = WARM_UP.min(count / 4).max(BATCH);
    rounds(site, plugin, "warm", warm, left, |done| {
        eprint!("\r  {done} of {warm} before the first reading  ");
        Ok(())
    })?;
    eprintln!();
    // Whoever is asked for numbers for the first time makes room for them.
    site.heap_in_use()?;
    let before = settled(site, None)?;
    let heap = site.heap_in_use()?;
    let started = Instant::now();
    let mut anonymous = Vec::new();
    rounds(site, plugin, "churn", count, left, |done| {
        if done * 10 / count > anonymous.len() {
            anonymous.push(Footprint::of(site)?.memory.anonymous);
        }
        let rate = done as f64 / started.elapsed().as_secs_f64();
        eprint!("\r  {done} of {count}, {rate:.0} a second  ");
        Ok(())
    })?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!();
    let after = settled(site, Some(&before))?;
    let in_use = heap.zip(site.heap_in_use()?);
    Ok(Churn {
        in_use,
        pods: count,
        seconds,
        before,
        after,
        anonymous,
    })
}

fn rounds(
    site: &Site,
    plugin: &Plugin,
    name: &str,
    count: usize,
    left: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    while done < count {
        interrupt::check()?;
        let size = BATCH.min(count - done);
        let batch = Batch::new(site, &format!("{name}-{done}"), Some("ambient"), size)?;
        for (_, sandbox) in &batch.pods {
            interrupt::check()?;
            plugin.add(sandbox)?;
        }
        batch.run()?;
        if done == 0 {
            let enrolled = site.enrolled()?.0;
            ensure!(
                enrolled == left + size,
                "{enrolled} pods are enrolled and not {}",
                left + size
            );
        }
        batch.end(plugin, left)?;
        done += size;
        progress(done)?;
    }
    Ok(())
}

/// Once nothing moves any more; or, with something to compare with, once all counts are as they were, or never will be.
fn settled(site: &Site, like: Option<&Footprint>) -> Result<Footprint> {
    let began = Instant::now();
    while began.elapsed() < QUIET {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let started = Instant::now();
    loop {
        interrupt::check()?;
        let now = Footprint::of(site)?;
        let same = like.is_none_or(|like| now.counts() == like.counts());
        if same || started.elapsed() > SETTLE {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

impl Churn {
    /// What grew, in words.
    pub(super) fn grown(&self) -> Vec<String> {
        let mut grown = Vec::new();
        let (before, after) = (self.before.counts(), self.after.counts());
        for ((name, before), (_, after)) in before.iter().zip(&after) {
            if after > before {
                grown.push(format!("{name}: {before} before, {after} after"));
            }
        }
        if let Some((before, after)) = self.in_use
            && after > before + SLACK_IN_USE
        {
            grown.push(format!(
                "memory in use: {before:.0} bytes before, {after:.0} after"
            ));
        }
        let (before, after) = (self.before.memory.rss, self.after.memory.rss);
        if after > before + SLACK_KIB {
            grown.push(format!(
                "resident memory: {before} KiB before, {after} KiB after"
            ));
        }
        grown
    }

    /// KiB of anonymous memory that a thousand pods of the second half left, should it still grow there.
    pub(super) fn slope(&self) -> Option<f64> {
        let half = self.anonymous.get(self.anonymous.len() / 2..)?;
        let (first, last) = (half.first()?, half.last()?);
        // The readings are a tenth of the pods apart.
        let pods = (half.len() - 1) as f64 * self.pods as f64 / 10.0;
        (pods > 0.0).then(|| (*last as f64 - *first as f64) * 1000.0 / pods)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "pods": self.pods, "seconds": self.seconds, "before": self.before.json(), "after": self.after.json(),
            "anonymous_kib": self.anonymous, "anonymous_kib_per_1000_of_second_half": self.slope(),
            "heap_in_use_bytes": self.in_use.map(|(before, after)| [before, after]), "grown": self.grown(),
        })
    }
}
