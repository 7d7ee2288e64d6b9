//! The editor of CNI configurations against real ones, each with what it must become, and against broken ones.
//!
//! `CULVERT_BLESS=1 cargo test -p culvert --test conflists` writes the expected results anew; read the diff.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod scratch;

use std::fs;

use culvert::install::{
    Entry, Mode, Plan,
    conflist::{self, Conf, Error, Released},
};
use scratch::{Scratch, entry, fixtures};
use serde_json::{Value, json};

fn all() -> Vec<String> {
    let dirs = fs::read_dir(fixtures()).unwrap();
    let mut names: Vec<String> = dirs
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() > 15, "{names:?}");
    names
}

fn ours() -> Entry {
    entry(&[("socket", "/run/culvert/agent.sock".into())])
}

fn parse(name: &str, text: &str) -> Value {
    assert!(Conf::parse(name, text.as_bytes()).is_ok(), "{text}");
    serde_json::from_str(text).unwrap()
}

/// The plan and the directory after it, as one text.
fn transcript(scratch: &Scratch, plan: &Plan) -> String {
    let root = scratch.root.to_str().unwrap();
    let mut text: String = plan
        .operations
        .iter()
        .map(|o| o.describe().replace(root, ""))
        .collect();
    for note in &plan.notes {
        text.push_str(&format!("note: {}\n", note.replace(root, "")));
    }
    for (name, (content, mode)) in scratch.picture() {
        text.push_str(&format!(
            "=== {name} {mode:04o}\n{}\n",
            String::from_utf8(content).unwrap()
        ));
    }
    text
}

#[test]
fn real_configurations_become_what_they_must() {
    let bless = std::env::var_os("CULVERT_BLESS").is_some();
    let mut wrong = Vec::new();
    for fixture in all() {
        for (mode, golden) in [(Mode::Chained, "chained"), (Mode::OwnList, "own-list")] {
            let scratch = Scratch::new(&format!("golden-{fixture}-{golden}"));
            let name = scratch.put_real(&fixture);
            fs::set_permissions(
                scratch.conf(&name),
                std::os::unix::fs::PermissionsExt::from_mode(0o644),
            )
            .unwrap();
            let installer = scratch.installer(mode);
            let plan = installer
                .plan()
                .unwrap_or_else(|e| panic!("{fixture}: {e}"));
            installer
                .apply(&plan)
                .unwrap_or_else(|e| panic!("{fixture}: {e}"));
            let text = transcript(&scratch, &plan);
            let path = fixtures().join(&fixture).join(format!("{golden}.golden"));
            if bless {
                fs::write(&path, &text).unwrap();
            } else if fs::read_to_string(&path).unwrap_or_default() != text {
                wrong.push(format!("{}:\n{text}", path.display()));
            }
            // Once more changes nothing.
            assert!(installer.plan().unwrap().is_done(), "{fixture} {golden}");
        }
    }
    assert!(
        wrong.is_empty(),
        "not as expected (CULVERT_BLESS=1 accepts it):\n{}",
        wrong.join("\n")
    );
}

#[test]
fn uninstalling_gives_back_the_same_bytes() {
    for fixture in all().iter().filter(|f| *f != "istio") {
        for mode in [Mode::Chained, Mode::OwnList, Mode::Auto] {
            let scratch = Scratch::new(&format!("inverse-{fixture}-{mode:?}"));
            scratch.put_real(fixture);
            let before = scratch.picture();
            let installer = scratch.installer(mode);
            assert!(scratch.settle(&installer) > 0, "{fixture}");
            assert!(scratch.picture().contains_key("bin/culvert-cni"));
            let plan = installer.plan_uninstall().unwrap();
            installer.apply(&plan).unwrap();
            assert_eq!(scratch.picture(), before, "{fixture} {mode:?}");
            assert!(installer.plan_uninstall().unwrap().operations.is_empty());
        }
    }
}

#[test]
fn what_the_network_is_stays_and_we_come_last() {
    for fixture in all() {
        let file = scratch::only_file(&fixtures().join(&fixture));
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let bytes = fs::read(&file).unwrap();
        let conf = Conf::parse(&name, &bytes).unwrap();
        let was: Value = serde_json::from_slice(&bytes).unwrap();
        let texts = if conflist::is_list(&name) {
            vec![
                conf.chain(&ours()).unwrap(),
                conf.own_list(&name, &ours()).unwrap(),
            ]
        } else {
            vec![
                conf.wrap(&name, None, &ours()).unwrap(),
                conf.own_list(&name, &ours()).unwrap(),
            ]
        };
        for text in texts {
            let is = parse("10-x.conflist", &text);
            assert_eq!(is["name"], was["name"], "IPAM stores by the network's name");
            assert_eq!(is["cniVersion"], was["cniVersion"]);
            let plugins = is["plugins"].as_array().unwrap();
            assert_eq!(plugins.last().unwrap()["type"], "culvert-cni");
            assert!(!text.contains("istio-cni"), "{text}");
            let theirs: Vec<&Value> = plugins
                .iter()
                .filter(|p| p["type"] != "culvert-cni")
                .collect();
            let theirs_before: Vec<&Value> = match was["plugins"].as_array() {
                Some(list) => list.iter().filter(|p| p["type"] != "istio-cni").collect(),
                None => vec![&was],
            };
            assert_eq!(theirs, theirs_before, "{fixture}");
        }
    }
}

#[test]
fn bytes_of_others_are_never_touched() {
    // Numbers no float can hold, escapes, odd blanks, empty objects: all of it has to come back.
    let text = "\r\n {\t\"x\":18446744073709551617,\"plugins\":[ {\"type\":\"a\",\"n\":1.10,\"e\":\"\\u00e9\\/\"}\n ,{\"type\":\"b\",\"o\":{}} ]\r\n\
                ,\"cniVersion\":\"1.0.0\" , \"name\":\"n\"}\n\n";
    let conf = Conf::parse("a.conflist", text.as_bytes()).unwrap();
    let with = conf.chain(&ours()).unwrap();
    let added = text.find("\"o\":{}}").unwrap() + "\"o\":{}}".len();
    assert!(with.starts_with(&text[..added]));
    assert_eq!(
        conflist::release("a.conflist", with.as_bytes()).unwrap(),
        Released::Edited(text.to_owned())
    );
}

#[test]
fn our_entry_is_updated_in_its_place() {
    let text = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},{"type":"culvert-cni","socket":"/old","new-key":1},{"type":"b"}]}"#;
    let conf = Conf::parse("a.conflist", text.as_bytes()).unwrap();
    let after = conf.chain(&ours()).unwrap();
    let value = parse("a.conflist", &after);
    assert_eq!(
        value["plugins"][1],
        json!({"type": "culvert-cni", "socket": "/run/culvert/agent.sock"})
    );
    assert_eq!(value["plugins"][2]["type"], "b");
    let again = Conf::parse("a.conflist", after.as_bytes()).unwrap();
    assert_eq!(again.chain(&ours()).unwrap(), after);
}

#[test]
fn only_one_entry_of_ours_stays() {
    let text = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"culvert-cni"},{"type":"istio-cni"},{"type":"a"},{"type":"culvert-cni"}]}"#;
    let conf = Conf::parse("a.conflist", text.as_bytes()).unwrap();
    let value = parse("a.conflist", &conf.chain(&ours()).unwrap());
    let types: Vec<&str> = value["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["type"].as_str().unwrap())
        .collect();
    assert_eq!(types, ["culvert-cni", "a"]);
}

#[test]
fn a_list_that_is_right_is_left_alone_however_it_is_written() {
    // Others write the file anew in their own style, and may put their own entry beside ours.
    let text = r#"{ "name": "n", "cniVersion": "1.0.0", "plugins": [ {"type": "a"}, { "socket" : "/run/culvert/agent.sock", "type" : "culvert-cni" }, {"type":"istio-cni"} ] }"#;
    let conf = Conf::parse("a.conflist", text.as_bytes()).unwrap();
    assert_eq!(conf.chain(&ours()).unwrap(), text);
}

#[test]
fn a_wrapped_configuration_survives_an_update_and_an_addition() {
    let lone = "\n{\"type\": \"bridge\", \"name\": \"n\", \"cniVersion\": \"0.3.1\"}\n\n";
    let conf = Conf::parse("10-b.conf", lone.as_bytes()).unwrap();
    let wrapped = conf.wrap("10-b.conf", None, &ours()).unwrap();
    let updated = Conf::parse("10-b.conflist", wrapped.as_bytes())
        .unwrap()
        .chain(&entry(&[("socket", "/new".into())]))
        .unwrap();
    assert!(updated.contains("/new"));
    match conflist::release("10-b.conflist", updated.as_bytes()).unwrap() {
        Released::Unwrapped(was, text) => {
            assert_eq!((was.name.as_str(), text.as_str()), ("10-b.conf", lone))
        }
        other => panic!("{other:?}"),
    }
    // With another plugin in it, it has to stay a list.
    let more = updated.replacen("\"plugins\": [", "\"plugins\": [{\"type\":\"portmap\"},", 1);
    match conflist::release("10-b.conflist", more.as_bytes()).unwrap() {
        Released::Edited(text) => {
            let value = parse("a.conflist", &text);
            assert_eq!(value["plugins"].as_array().unwrap().len(), 2);
            assert!(!text.contains("culvert"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn broken_configurations_are_named() {
    let list = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"}]}"#;
    let big = format!("{list}{}", " ".repeat(5 << 20));
    let deep = format!(
        "{{\"name\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let cases: Vec<(&str, &[u8], &str)> = vec![
        ("a.conflist", b"", "empty"),
        ("a.conflist", b" \n\t\n", "empty"),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"#,
            "cut off after line 1",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#,
            "no network `name`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"","plugins":[{"type":"a"}]}"#,
            "no network `name`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":7,"plugins":[{"type":"a"}]}"#,
            "no network `name`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n"}"#,
            "no `plugins`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
            "no `plugins`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":{}}"#,
            "no `plugins`",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":["a"]}"#,
            "plugin 1 is not an object",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},{}]}"#,
            "no `type` in plugin 2",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"a"}]}"#,
            "cniVersion \"0.2.0\"",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"9.9.9","name":"n","plugins":[{"type":"a"}]}"#,
            "cniVersion \"9.9.9\"",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":1,"name":"n","plugins":[{"type":"a"}]}"#,
            "cniVersion 1,",
        ),
        (
            "a.conflist",
            br#"{"name":"n","plugins":[{"type":"a"}]}"#,
            "is missing",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","name":"m","plugins":[{"type":"a"}]}"#,
            "`name` is there twice",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":[],"plugins":[{"type":"a"}]}"#,
            "`plugins` is there twice",
        ),
        (
            "a.conflist",
            br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","type":"b"}]}"#,
            "`type` is there twice",
        ),
        ("a.conflist", b"\xef\xbb\xbf{}", "byte order mark"),
        ("a.conflist", b"{\"name\":\"\xff\"}", "byte 9 is not UTF-8"),
        ("a.conflist", b"[]", "not a JSON object"),
        ("a.conflist", b"{\"name\": nonsense}", "not JSON: "),
        ("a.conflist", b"{} {}", "not JSON: "),
        ("a.conflist", deep.as_bytes(), "not JSON: "),
        ("a.conflist", big.as_bytes(), "bytes, more than the 1048576"),
        ("a.conf", list.as_bytes(), "not called .conflist"),
        ("a.json", list.as_bytes(), "not called .conflist"),
        (
            "a.conf",
            br#"{"cniVersion":"1.0.0","name":"n"}"#,
            "no `type` in the configuration",
        ),
        (
            "a.conf",
            br#"{"cniVersion":"1.0.0","type":"a"}"#,
            "no network `name`",
        ),
    ];
    for (name, bytes, wanted) in cases {
        let error = Conf::parse(name, bytes)
            .map(|_| ())
            .unwrap_err()
            .to_string();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]);
        assert!(error.contains(wanted), "{shown}: {error}");
        // Taking out never fails worse than by naming it.
        let _ = conflist::release(name, bytes);
    }
    let istio = br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"istio-cni"}]}"#;
    assert_eq!(
        Conf::parse("a.conflist", istio).unwrap().chain(&ours()),
        Err(Error::OnlyOurs)
    );
}

#[test]
fn a_list_of_several_versions_is_taken_by_the_one_we_speak() {
    let text = br#"{"cniVersion":"0.2.0","cniVersions":["0.2.0","1.0.0"],"name":"n","plugins":[{"type":"a"}]}"#;
    assert!(Conf::parse("a.conflist", text).is_ok());
}
