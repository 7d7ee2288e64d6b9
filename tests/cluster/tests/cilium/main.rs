//! Culvert beside the real Cilium, at its fast settings: no kube-proxy, routing and masquerading in BPF, socket load
//! balancing for the host alone. What is installed is `deploy/overlays/cilium`.
//!
//! The main tests of what Culvert does on a cluster, which `mesh` runs on the bridge network, run here too:
//!
//! | what | test |
//! |---|---|
//! | a label goes on and off live | `enrolment::a_running_namespace_goes_in_and_out_without_a_restart_and_without_a_cut` |
//! | pod before namespace | `enrolment::a_pods_label_beats_its_namespaces` |
//! | who is left alone | `enrolment::pods_of_the_node_of_the_system_and_of_the_mesh_itself_are_left_alone` |
//! | the kubelet's probes | `probes::probes_of_every_kind_pass_and_are_not_mesh_traffic` |
//! | the first instruction | `starts::an_init_container_sends_nothing_in_the_clear` |
//! | Jobs | `starts::jobs_send_nothing_in_the_clear_and_end` |
//! | StatefulSets | `starts::a_stateful_pod_comes_back_under_its_name` |
//! | Deployments | `starts::a_deployment_that_rolls_at_full_speed_sends_nothing_in_the_clear` |
//! | nodes and families | `traffic::pods_speak_hbone_within_a_node_and_from_node_to_node_in_both_families` |
//! | Services | `traffic::services_reach_enrolled_pods_from_inside_and_outside` |
//! | exec, logs, port-forward | `traffic::exec_logs_and_port_forward_work_on_enrolled_pods` |
//! | capabilities | `privileges::an_agent_without_any_one_of_its_capabilities_ends_and_names_it` |
//! | rights | `privileges::the_agents_token_is_good_for_what_its_roles_list_and_nothing_else` |
//!
//! And those that only concern Cilium: `beside`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

mod agent;
mod beside;

#[path = "../mesh/bed.rs"]
mod bed;
#[path = "../mesh/capture.rs"]
mod capture;
#[path = "../mesh/elsewhere.rs"]
mod elsewhere;
#[path = "../mesh/enrolment.rs"]
mod enrolment;
#[path = "../agent/traffic.rs"]
mod flow;
#[path = "../mesh/privileges.rs"]
mod privileges;
#[path = "../mesh/probes.rs"]
mod probes;
#[path = "../mesh/starts.rs"]
mod starts;
#[path = "../mesh/traffic.rs"]
mod traffic;
#[path = "../mesh/turns.rs"]
mod turns;
#[path = "../mesh/variant.rs"]
mod variant;

use culvert_cluster::{Cni, Options};

/// The cluster that these tests share.
fn options() -> Options {
    Options {
        name: "cilium".to_owned(),
        cni: Cni::Cilium,
        ..Options::default()
    }
}
