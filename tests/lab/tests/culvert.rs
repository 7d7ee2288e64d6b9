//! The real binary, run against a lab. What it does is the e2e tests' business; that it is asked in the right way, and
//! that its answers arrive, is ours.

use culvert_lab::Lab;

#[test]
fn the_binary_is_run_with_the_labs_places_and_its_answers_arrive() {
    let lab = Lab::new("culvert").unwrap();
    let command = lab.culvert_command(&["netns", "list"]).unwrap();
    let args: Vec<_> = command
        .get_args()
        .map(|arg| arg.to_str().unwrap())
        .collect();
    let (bpffs, cgroup) = (
        lab.bpffs().to_str().unwrap(),
        lab.cgroup().to_str().unwrap(),
    );
    assert_eq!(
        args,
        ["--bpffs", bpffs, "--cgroup-root", cgroup, "netns", "list"]
    );

    let listed = lab.culvert(&["-o", "json", "netns", "list"]).unwrap();
    let listed = listed.ok().unwrap().json().unwrap();
    assert!(!listed.to_string().contains("netns/"), "{listed}");

    let refused = lab
        .culvert(&["netns", "attach", "--netns", "/no/such"])
        .unwrap();
    assert!(refused.stderr.contains("/no/such"), "{refused:?}");
    let error = refused.ok().unwrap_err().to_string();
    assert!(
        error.contains("netns attach --netns /no/such") && error.contains("failed"),
        "{error}"
    );
    let events = lab.culvert_spawn(&["--help"]).unwrap();
    events
        .wait_for_output("Usage", std::time::Duration::from_secs(10))
        .unwrap();
}
