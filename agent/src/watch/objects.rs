//! Kubernetes objects as they come over the wire, cut down to what is used: the rest is skipped while it is read and
//! never takes memory.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
    net::IpAddr,
};

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde::{Deserialize, Deserializer};

use crate::model::{self, Namespace, Phase, Uncaptured, keys};

/// A pod of the API or of a manifest.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pod {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: Spec,
    #[serde(default)]
    pub(super) status: Status,
}

/// The part of a pod's `spec` that counts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Spec {
    host_network: Option<bool>,
    runtime_class_name: Option<String>,
    service_account_name: Option<String>,
    dns_policy: Option<String>,
    dns_config: Option<DnsConfig>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct DnsConfig {
    nameservers: Option<Vec<String>>,
}

/// The part of a pod's `status` that counts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
    conditions: Option<Vec<Condition>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    reason: Option<String>,
    message: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: Option<String>,
}

/// Metadata without what nobody here reads: managed fields are often the larger part of an object.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    deletion_timestamp: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
}

pub(super) fn meta<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    let meta = Meta::deserialize(from)?;
    Ok(ObjectMeta {
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        resource_version: meta.resource_version,
        labels: meta.labels,
        annotations: meta.annotations,
        deletion_timestamp: meta.deletion_timestamp,
        ..ObjectMeta::default()
    })
}

impl Resource for Pod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// An object of which only metadata is asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound = "")]
pub(super) struct Metadata<K> {
    #[serde(deserialize_with = "meta")]
    pub(super) metadata: ObjectMeta,
    #[serde(skip)]
    of: PhantomData<fn() -> K>,
}

impl<K: Resource<DynamicType = ()>> Resource for Metadata<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn metadata_api() -> bool {
        true
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// `None` for an object that lacks what each pod has.
pub(super) fn pod(pod: Pod) -> Option<model::Pod> {
    let Pod {
        metadata,
        spec,
        status,
    } = pod;
    let annotations = kept(metadata.annotations);
    let static_uid = annotations.get(keys::CONFIG_HASH);
    Some(model::Pod {
        nameservers: nameservers(&spec),
        uid: metadata.uid.as_deref()?.into(),
        static_uid: static_uid.map(|uid| uid.as_str().into()),
        namespace: metadata.namespace?,
        name: metadata.name?,
        service_account: spec.service_account_name.unwrap_or_default(),
        labels: metadata.labels.unwrap_or_default(),
        annotations,
        host_network: spec.host_network.unwrap_or(false),
        runtime_class: spec.runtime_class_name.filter(|c| !c.is_empty()),
        phase: match status.phase.as_deref() {
            Some("Running") => Phase::Running,
            Some("Succeeded") => Phase::Succeeded,
            Some("Failed") => Phase::Failed,
            _ => Phase::Pending,
        },
        deleting: metadata.deletion_timestamp.is_some(),
        addresses: addresses(&status),
        uncaptured: status.conditions.and_then(uncaptured),
    })
}

fn uncaptured(conditions: Vec<Condition>) -> Option<Uncaptured> {
    let mut conditions = conditions.into_iter();
    let ours = conditions.find(|c| c.kind == keys::CAPTURED)?;
    Some(Uncaptured {
        reason: ours.reason.unwrap_or_default(),
        message: ours.message.unwrap_or_default(),
    })
}

fn nameservers(spec: &Spec) -> BTreeSet<IpAddr> {
    let alone = spec.dns_policy.as_deref() == Some("None");
    let config = spec.dns_config.as_ref().filter(|_| alone);
    let named = config
        .and_then(|c| c.nameservers.as_ref())
        .into_iter()
        .flatten();
    named
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .map(|ip| ip.to_canonical())
        .collect()
}

fn addresses(status: &Status) -> BTreeSet<IpAddr> {
    let list = status.pod_ips.iter().flatten();
    let list: Vec<&str> = list.filter_map(|a| a.ip.as_deref()).collect();
    let texts = if list.is_empty() {
        status.pod_ip.iter().map(String::as_str).collect()
    } else {
        list
    };
    texts.into_iter().filter_map(|a| a.parse().ok()).collect()
}

/// A namespace from its metadata.
pub(super) fn namespace(metadata: ObjectMeta) -> Option<(String, Namespace)> {
    let namespace = Namespace {
        labels: metadata.labels.unwrap_or_default(),
        annotations: kept(metadata.annotations),
    };
    Some((metadata.name?, namespace))
}

fn kept(annotations: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut annotations = annotations.unwrap_or_default();
    annotations.retain(|key, _| keys::KEPT.contains(&key.as_str()));
    annotations
}
