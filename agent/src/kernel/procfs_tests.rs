//! The cgroup files of real runtimes and drivers, and what is none of a pod.

use proptest::prelude::*;

use super::*;

const UID: &str = "4aa5e1c6-0a1f-4c9f-9d2c-5b7c8a4c2f3b";
const SYSTEMD: &str = "4aa5e1c6_0a1f_4c9f_9d2c_5b7c8a4c2f3b";
const HASHED: &str = "1a53ea6d2a1ad6d6ad7bc3bd0ae3b3d5";
const CONTAINER: &str = "8a2d9f1e6b0c4d5e7f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6";

fn uid(file: &str) -> Option<String> {
    pod_uid(file.as_bytes())
}

#[track_caller]
fn names(path: &str, expected: &str) {
    let path = path
        .replace("UID", UID)
        .replace("SYSTEMD", SYSTEMD)
        .replace("HASHED", HASHED)
        .replace("CTR", CONTAINER);
    // As the v2 line, as a v1 line, and on a hybrid host where only one v1 hierarchy tells.
    for file in [
        format!("0::{path}\n"),
        format!("12:memory:{path}\n11:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/\n"),
        format!("3:cpuset:/\n2:pids:{path}\n0::/system.slice/containerd.service\n"),
    ] {
        assert_eq!(uid(&file).as_deref(), Some(expected), "{file}");
    }
}

#[test]
fn every_runtime_and_driver_is_understood() {
    for path in [
        // cgroupfs driver: containerd and dockershim's heirs, with and without a QoS class.
        "/kubepods/podUID/CTR",
        "/kubepods/burstable/podUID/CTR",
        "/kubepods/besteffort/podUID/CTR",
        "/kubepods/besteffort/podUID",
        // CRI-O, cgroupfs driver.
        "/kubepods/besteffort/podUID/crio-CTR",
        "/kubepods/burstable/podUID/crio-conmon-CTR",
        // systemd driver: containerd, CRI-O, docker.
        "/kubepods.slice/kubepods-podSYSTEMD.slice/cri-containerd-CTR.scope",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podSYSTEMD.slice/cri-containerd-CTR.scope",
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSYSTEMD.slice/crio-CTR.scope",
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSYSTEMD.slice/crio-CTR.scope/container",
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSYSTEMD.slice/docker-CTR.scope",
        // kubelet with the systemd driver, containerd without: runc is handed systemd's triple as a path.
        "/system.slice/containerd.service/kubepods-burstable-podSYSTEMD.slice:cri-containerd:CTR",
        "/kubepods-besteffort-podSYSTEMD.slice:cri-containerd:CTR",
        // kind, and a kubelet with a cgroup root of its own.
        "/kubelet/kubepods/besteffort/podUID/CTR",
        "/docker/CTR/kubelet/kubepods/burstable/podUID/CTR",
        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podSYSTEMD.slice/cri-containerd-CTR.scope",
        "/system.slice/docker-CTR.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podSYSTEMD.slice/cri-containerd-CTR.scope",
        "/node1/kubepods/besteffort/podUID/CTR",
        "/node1.slice/node1-kubepods.slice/node1-kubepods-besteffort.slice/node1-kubepods-besteffort-podSYSTEMD.slice/crio-CTR.scope",
        // Seen from a container with a cgroup namespace of its own.
        "/../../podUID/CTR",
        "/../../../kubepods-burstable.slice/kubepods-burstable-podSYSTEMD.slice/cri-containerd-CTR.scope",
        // systemd as a container's first process makes cgroups below it.
        "/kubepods/burstable/podUID/CTR/init.scope",
        "/kubepods/burstable/podUID/CTR/system.slice/nginx.service",
        // Its cgroup was removed under it.
        "/kubepods/besteffort/podUID (deleted)",
        "/kubepods/besteffort/podUID/CTR (deleted)",
    ] {
        names(path, UID);
    }
}

#[test]
fn static_pods_are_known_by_their_hash() {
    for path in [
        "/kubepods/burstable/podHASHED/CTR",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podHASHED.slice/cri-containerd-CTR.scope",
        "/kubepods.slice/kubepods-podHASHED.slice/crio-CTR.scope",
        "/system.slice/containerd.service/kubepods-burstable-podHASHED.slice:cri-containerd:CTR",
    ] {
        names(path, HASHED);
    }
}

#[test]
fn of_a_pod_in_a_pod_the_inner_one_counts() {
    let inner = "0b1f1c4a-6d25-4b51-8f50-0d6cf2c62b11";
    let path = format!(
        "/kubepods/besteffort/pod{UID}/{CONTAINER}/kubelet/kubepods/pod{inner}/{CONTAINER}"
    );
    assert_eq!(uid(&format!("0::{path}\n")).as_deref(), Some(inner));
}

#[test]
fn nothing_else_is_taken_for_a_pod() {
    for path in [
        "/".to_owned(),
        "/init.scope".to_owned(),
        "/system.slice/kubelet.service".to_owned(),
        "/kubepods/burstable".to_owned(),
        format!("/docker/{CONTAINER}"),
        format!("/machine.slice/libpod_pod_{CONTAINER}.slice/libpod-{CONTAINER}.scope"),
        // No UID, or not only one.
        "/kubepods/besteffort/pod/x".to_owned(),
        "/kubepods/besteffort/podinfo".to_owned(),
        format!("/kubepods/besteffort/{UID}/x"),
        format!("/kubepods/besteffort/pod{UID}0/x"),
        format!("/kubepods/besteffort/tripod{UID}/x"),
        format!("/kubepods/besteffort/pod{}/x", &UID[..35]),
        format!("/kubepods/besteffort/pod{}/x", UID.replace('4', "g")),
        format!("/kubepods/besteffort/pod{}/x", UID.replacen('-', "_", 2)),
        format!("/kubepods/besteffort/pod{}/x", UID.replace('-', "/")),
        format!("/kubepods/besteffort/pod{}/x", &HASHED[1..]),
    ] {
        assert_eq!(uid(&format!("0::{path}\n")), None, "{path}");
    }
    for file in ["", "\n", "0:", "0:/pod", "::", UID, &format!("pod{UID}")] {
        assert_eq!(uid(file), None, "{file:?}");
    }
}

#[test]
fn bytes_that_are_no_text_do_not_hide_a_pod() {
    let mut file = b"5:name=\xff\xfe:/\xff\n0::/kubepods/\xffx/pod".to_vec();
    file.extend(UID.as_bytes());
    file.extend(b"/\xff\n");
    assert_eq!(pod_uid(&file).as_deref(), Some(UID));
}

proptest! {
    #[test]
    fn whatever_is_found_has_the_form_of_a_uid(file in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(uid) = pod_uid(&file) {
            prop_assert!(matches!(uid.len(), UUID | HASH));
        }
    }

    #[test]
    fn any_uid_is_found_wherever_the_kubelet_puts_it(
        uid in "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}",
        root in "(/[a-z0-9.:-]{0,12}){0,4}",
        tail in "(/[a-z0-9.:-]{0,12}){0,3}",
        systemd in any::<bool>(),
    ) {
        let pod = if systemd {
            format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"))
        } else {
            format!("pod{uid}")
        };
        let file = format!("7:cpu:/\n0::{root}/{pod}{tail}\n");
        prop_assert_eq!(pod_uid(file.as_bytes()), Some(uid));
    }
}
