//! `culvert agent`: its parts put together, started in order and ended in order.
//!
//! Decides nothing about pods. What a part cannot do without, it fails for at once, with the cure; what may come later
//! (the API server, ztunnel, the CNI configuration) is waited for under a name in /readyz.

mod added;
mod cilium;
mod counting;
pub mod failed;
mod headroom;
mod installing;
mod lock;
mod lookups;
mod probes;
mod requests;
mod rights;
mod serving;
mod tasks;
mod tracking;
mod ztunnels;

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};

use crate::{
    admin::{
        self, Admin, Installation, Liveness, LogControl, Metrics, Readiness, Shutdown,
        labels::{By, RepairKind},
    },
    cni_server,
    config::{Config, DnsScope, Loaded},
    kernel::{
        LoadOptions, Netns, Node, earlier, memory,
        pod::{self, Policy},
    },
    plan::membership::{self, Settings},
    reconcile::{
        Options, Reconciler,
        live::Live,
        publish::{self, Remembered},
    },
    traces,
    watch::{Manifests, Source, api, client},
    zds,
};
use tasks::Tasks;

/// The loop is taken for dead when it has made no pass for this many periods.
const MISSED_PASSES: u32 = 6;
/// After this long without a list of pods, those that were captured before are taken up without one.
const RESTORE_AFTER: Duration = Duration::from_secs(5);
/// How often memory that a burst of work has freed is given back.
const TIDY: Duration = Duration::from_secs(10);

/// How often readiness learns how the watch stands.
const LOOK_AT_WATCH: Duration = Duration::from_millis(500);

/// Runs the agent until it is told to stop.
pub async fn run(loaded: Loaded, log: LogControl) -> Result<()> {
    let Loaded {
        config, warnings, ..
    } = loaded;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let shutdown = Shutdown::on_signals(config.shutdown_timeout)?;
    let end = shutdown.token();
    let mut tasks = Tasks::new(end.clone());
    let metrics = Arc::new(Metrics::new());
    let readiness = Readiness::default();
    let liveness = Liveness::new(config.reconcile_period * MISSED_PASSES);
    let admin = Admin {
        readiness: readiness.clone(),
        liveness: liveness.clone(),
        metrics: Arc::clone(&metrics),
        log,
    };
    // Before all else; an agent that is ending gives its ports back before this.
    let _lock = lock::Lock::take(&config.run_dir).await?;
    // Then ports: one that is taken ends this before anything has been changed.
    let bound = admin.bind(config.metrics_address, config.health_address)?;
    tasks.keep("admin", serving::admin(bound, end.clone()));
    let listed = readiness.task("watch");
    listed.set_not_ready("pods and namespaces have not been listed yet");
    let programs = readiness.task("programs");
    programs.set_not_ready("not loaded yet");

    let traces = match &config.otlp_endpoint {
        None => None,
        Some(collector) => {
            let node = config.node_name.as_deref().unwrap_or_default();
            let exporter = traces::start(collector, node, Arc::clone(&metrics))
                .with_context(|| format!("preparing to send traces to {}", collector.url()))?;
            Some(exporter)
        }
    };

    probes::check(&config)?;
    let settings = settings(&config)?;
    let source = Arc::new(source(&config, &settings).await?);
    cilium::refuse(&source).await?;
    let memory = config.run_dir.join("captured.json");
    let remembered = publish::recall(&memory);
    let (node, home, leftovers) = load(&config, &remembered).await?;
    metrics
        .repairs
        .get_or_create(&By(RepairKind::Leftover))
        .inc_by(u64::try_from(leftovers).unwrap_or(0));
    let kubelet = probes::follow(&config, &node)?;
    if let Some(follower) = &kubelet {
        tasks.keep_until_end("kubelet", follower.ended());
    }
    programs.set_ready();
    let lookups = lookups::show(Arc::clone(&node), readiness.task("lookups"));
    tasks.keep_until_end("lookups", lookups);
    let cluster = source.subscribe();
    tasks.keep_until_end("watch", {
        let source = Arc::clone(&source);
        async move { source.run().await }
    });

    if config.pods.is_none() {
        let cilium = cilium::keep(
            Arc::clone(&source),
            Arc::clone(&node),
            Arc::clone(&metrics),
            readiness.task("cilium"),
            end.clone(),
        );
        tasks.keep("cilium", cilium);
        let rights = rights::keep(
            Arc::clone(&source),
            config.daemonset_namespace.clone(),
            readiness.task("rights"),
            end.clone(),
        );
        tasks.keep("rights", rights);
    }

    let named = ztunnels::can_be_named();
    let (zds, events) = ztunnels::serve(&config, Arc::clone(&node), named)?;
    tasks.keep_until_end("zds", {
        let zds = zds.clone();
        async move { zds.ended().await }
    });
    let files = readiness.task("ztunnel-files");
    tasks.keep_until_end(
        "headroom",
        headroom::keep(
            zds.clone(),
            Arc::clone(&source),
            Arc::clone(&metrics),
            files,
        ),
    );
    let (tracker, tracked) = tracking::start(Arc::clone(&node))?;
    let installation = Installation::default();
    let live = Live {
        node: Arc::clone(&node),
        tracker: Arc::new(tracker),
        zds: zds.clone(),
        source: Arc::clone(&source),
        metrics: Arc::clone(&metrics),
        installation: installation.clone(),
        fetch: named,
    };
    let options = Options {
        settings: settings.clone(),
        grace: config.ztunnel_grace.0,
        polite_dns: config.dns_scope == DnsScope::ResolvConf,
        named_ztunnel: named,
        period: config.reconcile_period,
        concurrency: config.enrolment_concurrency.get(),
        remembered,
        memory: Some(memory),
    };
    let reconciler = Reconciler::new(live, options, cluster.clone());
    tasks.keep(
        "ztunnels",
        ztunnels::listen(
            events,
            reconciler.clone(),
            Arc::clone(&metrics),
            end.clone(),
        ),
    );
    tasks.keep_until_end(
        "tracker",
        tracking::tell(tracked, reconciler.clone(), Arc::clone(&metrics)),
    );
    tasks.keep(
        "counting",
        counting::keep(
            reconciler.clone(),
            Arc::clone(&metrics),
            liveness,
            end.clone(),
        ),
    );
    counting::verdicts(&metrics, &node);
    counting::probes(&metrics, &node);
    tasks.keep("reconciler", {
        let (reconciler, end) = (reconciler.clone(), end.clone());
        async move { reconciler.run(end).await }
    });
    tasks.once("opening", open_zds(reconciler.clone(), zds.clone()));
    tasks.keep_until_end(
        "readiness",
        show_watch(reconciler.clone(), Arc::clone(&source), listed),
    );
    let decisions = readiness.task("decision-file");
    decisions.set_ready();
    let published = publish::keep(
        config.decision_file.clone(),
        cluster.clone(),
        settings.clone(),
        end.clone(),
        move |error| match error {
            None => decisions.set_ready(),
            Some(error) => decisions.set_not_ready(format!("cannot be written: {error}")),
        },
    );
    tasks.keep("decision-file", published);
    let requests = Arc::new(requests::Requests {
        reconciler: reconciler.clone(),
        source: Arc::clone(&source),
        cluster: cluster.clone(),
        settings,
        installation: installation.clone(),
        home,
    });
    let counters = Arc::new(cni_server::Counters::default());
    let status = serving::Status {
        node: config.node_name.clone().unwrap_or_default(),
        started: std::time::Instant::now(),
        readiness: readiness.clone(),
        zds,
        reconciler: reconciler.clone(),
    };
    metrics.count_plugin(&counters);
    metrics.count_watch(&source);
    let app = admin::timed(
        cni_server::router(requests, Arc::clone(&counters)),
        &metrics,
    )
    .merge(serving::status(status));
    let listener = cni_server::Listener::bind(&config.agent_socket)?;
    tasks.keep("plugin", listener.serve(app, end.clone().cancelled_owned()));
    if config.cni_install {
        let task = readiness.task("cni-installed");
        let installer = installing::keep(
            config.clone(),
            Arc::clone(&source),
            Arc::clone(&metrics),
            task,
            installation,
            end.clone(),
        );
        tasks.keep("installer", installer);
    } else {
        metrics.count_no_installer();
    }
    tasks.keep_until_end("tidying", async {
        loop {
            tokio::time::sleep(TIDY).await;
            memory::give_back();
        }
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        zds = %config.zds_socket.display(),
        socket = %config.agent_socket.display(),
        ztunnel_named = named,
        "running"
    );
    tokio::select! {
        () = shutdown.requested() => {}
        died = tasks.death() => return Err(died.into()),
    }
    if !matches!(
        shutdown.finish(tasks.finish()).await,
        crate::admin::shutdown::Ended::Done(())
    ) {
        tracing::warn!("some work was left to the next agent");
    }
    if let Some(traces) = traces {
        tokio::task::spawn_blocking(|| traces.finish()).await?;
    }
    Ok(())
}

/// The node's programs, this build's, with the pods that another version captured; the cookie of the node's own namespace;
/// how many leftovers were cleared away.
async fn load(config: &Config, remembered: &[Remembered]) -> Result<(Arc<Node>, u64, usize)> {
    let options = LoadOptions {
        bpffs: config.bpffs.clone(),
        cgroup_root: config.cgroup_root.clone(),
        dns_cgroup: config.dns_cgroup.clone(),
        probe_source: Some(probes::source(config.probe_source)),
        at_home: true,
        set_aside: true,
    };
    let mut policies: HashMap<u64, Policy> = remembered
        .iter()
        .filter_map(|r| Some((r.cookie, r.policy.clone()?)))
        .collect();
    // Of the others the first pass says how they are to be treated.
    let unknown = Policy {
        hold: config.ztunnel_grace.0,
        named_ztunnel: ztunnels::can_be_named(),
        ..Policy::default()
    };
    tokio::task::spawn_blocking(move || {
        let (node, report) = Node::load(&options)?;
        let taken = earlier::take_over(&node, |cookie| {
            policies.remove(&cookie.0).unwrap_or_else(|| unknown.clone())
        })?;
        if taken.pods > 0 {
            tracing::info!(pods = taken.pods, "taken over from another version");
        }
        for (cookie, why) in taken.left {
            tracing::warn!(%cookie, "not taken over, another version's programs go on with it: {why}");
        }
        let collected = pod::collect(&node)?;
        tracing::info!(adopted = report.adopted, collected, "programs loaded");
        let home = Netns::current()?.cookie().0;
        Ok::<_, crate::kernel::Error>((Arc::new(node), home, collected))
    })
    .await?
    .context("loading the programs")
}

fn settings(config: &Config) -> Result<Settings> {
    let selectors = match &config.enablement_selectors.0 {
        None => membership::default_selectors(),
        Some(selectors) => membership::parse_selectors(&selectors.to_string())
            .map_err(|why| anyhow::anyhow!("enablement-selectors: {why}"))?,
    };
    Ok(Settings {
        selectors,
        excluded_namespaces: config.excluded_namespaces.clone(),
        system_namespace: config.system_namespace.clone(),
        dns: config.dns_capture,
        ipv6: config.ipv6,
        sandboxed_runtime_classes: config.sandboxed_runtime_classes.0.clone(),
    })
}

async fn source(config: &Config, settings: &Settings) -> Result<Source> {
    if let Some(path) = &config.pods {
        return Ok(Source::Manifests(Manifests::new(path)));
    }
    let node = config.node_name.clone().context(
        "the node's name is not known: set NODE_NAME from spec.nodeName, or give --node-name; without Kubernetes, give --pods",
    )?;
    let kube = client::config(config.kubeconfig.as_deref().map(Path::new)).await?;
    let options = api::Options {
        instance: std::env::var("POD_NAME").unwrap_or_else(|_| node.clone()),
        node,
        opt_in: settings.opt_in_selectors(),
    };
    Ok(Source::Api(api::Api::new(client::connect(&kube)?, options)))
}

/// Lets ztunnel be answered as soon as it is known whom it has to serve.
async fn open_zds(reconciler: Reconciler<Live>, zds: zds::Server) {
    let mut settled = reconciler.settled();
    let known = tokio::time::timeout(RESTORE_AFTER, settled.wait_for(|s| *s))
        .await
        .is_ok();
    if !known {
        reconciler.restore().await;
    }
    zds.open();
}

/// Says how the watch stands: not ready until all has been listed once; interrupted later, what is known stays valid.
async fn show_watch(reconciler: Reconciler<Live>, source: Arc<Source>, task: admin::Task) {
    let settled = reconciler.settled();
    loop {
        let trouble = match &*source {
            Source::Api(api) => api.stats().trouble(),
            Source::Manifests(manifests) => {
                let problems = manifests.problems();
                let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
                (!texts.is_empty()).then(|| texts.join("; "))
            }
        };
        if *settled.borrow() {
            task.set_ready_but(trouble.unwrap_or_default());
        } else {
            let why = trouble.map_or_else(String::new, |why| format!(": {why}"));
            task.set_not_ready(format!(
                "pods and namespaces have not been listed yet, or members not looked for{why}"
            ));
        }
        tokio::time::sleep(LOOK_AT_WATCH).await;
    }
}
