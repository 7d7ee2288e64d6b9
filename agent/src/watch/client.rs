//! The connection to the API server: notices within seconds when it has silently died, and never hangs.
//!
//! A watch is silent for minutes when nothing happens, so silence proves nothing; TCP keepalive asks the other side's
//! kernel, at no cost to the API server.

use std::{path::Path, time::Duration};

use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder, timeout::TimeoutLayer};

use super::{
    error::{Error, Result},
    token::Token,
};

/// Silence after which the other side is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(4);
/// Between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Unanswered for this long, the connection is dead; also ends one on which data stays unacknowledged.
const DEAD_AFTER: Duration = Duration::from_secs(8);
/// A connection attempt lost in a black hole is given up soon, since the next one may be lucky.
const CONNECT: Duration = Duration::from_secs(3);
/// Until the head of an answer has come, connecting included. Bodies may take as long as they like.
const ANSWER: Duration = Duration::from_secs(10);
/// Unused connections are closed.
const POOL_IDLE: Duration = Duration::from_secs(30);

/// How to reach the API server: from a kubeconfig, or else as a pod does.
pub async fn config(kubeconfig: Option<&Path>) -> Result<Config> {
    let Some(path) = kubeconfig else {
        return Config::incluster().map_err(|e| {
            Error::config(
                "the pod's service account",
                &e,
                "outside a pod, give --kubeconfig FILE, or --pods PATH to work without Kubernetes",
            )
        });
    };
    let cure = "check the file that --kubeconfig names";
    let file = Kubeconfig::read_from(path).map_err(|e| Error::config(path.display(), &e, cure))?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .map_err(|e| Error::config(path.display(), &e, cure))
}

/// A client for it.
pub fn connect(config: &Config) -> Result<Client> {
    let wrong = |e: kube::Error| {
        let cure = "check the certificates and the token that the configuration names";
        Error::config(&config.cluster_url, &e, cure)
    };
    let mut config = config.clone();
    let token = match config.auth_info.token_file.take() {
        Some(path) => {
            let cure = "check that the token of the service account is mounted there (automountServiceAccountToken, or a \
                        projected volume)";
            let token = Token::open(Path::new(&path));
            Some(token.map_err(|e| Error::config(&path, &e, cure))?)
        }
        None => None,
    };
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_keepalive(Some(KEEPALIVE_IDLE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(3));
    tcp.set_tcp_user_timeout(Some(DEAD_AFTER));
    let tls = config
        .rustls_https_connector_with_connector(tcp)
        .map_err(wrong)?;
    let http = HttpClient::builder(TokioExecutor::new())
        .pool_idle_timeout(POOL_IDLE)
        .build::<_, Body>(tls);
    // No retries below us: those who ask know best when to ask again, and kube's would go on for hours.
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(wrong)?)
        .map_request(move |request| match &token {
            Some(token) => token.sign(request),
            None => request,
        })
        .layer(config.extra_headers_layer().map_err(wrong)?)
        .layer(TimeoutLayer::new(ANSWER))
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace.clone()).build())
}
