//! Controller-manager and scheduler: their credentials and command lines.

use std::process::Command;

use anyhow::Result;

use crate::api::{Api, SERVICES, flag};
use crate::kubeconfig::Proof;
use crate::parts::Part;
use crate::plan::Plan;
use crate::server::Server;
use crate::tool;

/// Starts both. They wait for the API server by themselves.
pub(crate) fn start(api: &Api, plan: Plan) -> Result<Vec<Server>> {
    [
        (Part::KubeControllerManager, controller_manager(api, plan)?),
        (Part::KubeScheduler, scheduler(api)?),
    ]
    .into_iter()
    .map(|(part, command)| Server::start(api.scratch(), part.name(), command, api.spec().lifetime))
    .collect()
}

fn controller_manager(api: &Api, plan: Plan) -> Result<Command> {
    let mut command = with_credentials(api, Part::KubeControllerManager)?;
    command.args([
        flag("root-ca-file", &api.ca()),
        flag(
            "service-account-private-key-file",
            &api.pki().service_accounts().key,
        ),
        "--use-service-account-credentials".to_owned(),
        // Nodes come with their ranges.
        "--allocate-node-cidrs=false".to_owned(),
        format!("--cluster-cidr={}", plan.all_pods()),
        format!("--service-cluster-ip-range={SERVICES}"),
    ]);
    Ok(command)
}

fn scheduler(api: &Api) -> Result<Command> {
    with_credentials(api, Part::KubeScheduler)
}

fn with_credentials(api: &Api, part: Part) -> Result<Command> {
    let name = part.name();
    let pair = api.pki().issue(name, &format!("system:{name}"), "", &[])?;
    let kubeconfig = api.scratch().join(format!("{name}.kubeconfig"));
    api.write_kubeconfig(&kubeconfig, &Proof::Certificate(pair))?;
    let mut command = tool::command(api.parts().get(part)?);
    command.args([
        flag("kubeconfig", &kubeconfig),
        flag("authentication-kubeconfig", &kubeconfig),
        flag("authorization-kubeconfig", &kubeconfig),
        format!("--bind-address={}", api.spec().address),
        // There is one of it.
        "--leader-elect=false".to_owned(),
        "--profiling=false".to_owned(),
    ]);
    Ok(command)
}
