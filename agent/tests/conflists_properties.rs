//! What holds for every configuration, however it is written.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use culvert::install::{
    Entry, Options,
    conflist::{self, Conf, Released},
};
use proptest::prelude::*;
use serde_json::{Map, Value};

/// A configuration in somebody's style: blanks of his choice around every token.
#[derive(Clone, Debug)]
struct Written {
    text: String,
    value: Value,
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        // What an editor by search and replace would trip over.
        "[\\[\\]{}:,\"\\\\ a-zé\u{1}\n]{0,12}".prop_map(Value::from),
        Just(Value::from("culvert-cni")),
        Just(Value::from("plugins")),
    ]
}

fn tree() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z\"\\\\}]{1,6}", inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn plugin() -> impl Strategy<Value = Value> {
    let others = prop::collection::vec(("[a-su-z][a-z\"{]{0,5}", tree()), 0..4);
    ("[a-z]{1,8}", others, any::<bool>()).prop_map(|(kind, others, first)| {
        let mut plugin = Map::new();
        if first {
            plugin.insert("type".into(), kind.clone().into());
        }
        plugin.extend(others);
        plugin.insert("type".into(), kind.into());
        Value::Object(plugin)
    })
}

fn blank() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[ \t\r\n]{0,3}", 1..8)
}

/// As text, with the next of the blanks at every place where one may be.
fn write(value: &Value, blanks: &mut impl Iterator<Item = String>, out: &mut String) {
    out.push_str(&blanks.next().unwrap());
    match value {
        Value::Object(members) => {
            out.push('{');
            for (i, (key, value)) in members.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { "," });
                out.push_str(&blanks.next().unwrap());
                out.push_str(&serde_json::to_string(key).unwrap());
                out.push_str(&blanks.next().unwrap());
                out.push(':');
                write(value, blanks, out);
            }
            out.push_str(&blanks.next().unwrap());
            out.push('}');
        }
        Value::Array(elements) => {
            out.push('[');
            for (i, value) in elements.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { "," });
                write(value, blanks, out);
            }
            out.push_str(&blanks.next().unwrap());
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
    out.push_str(&blanks.next().unwrap());
}

fn written(value: Value, blanks: Vec<String>) -> Written {
    let mut text = String::new();
    write(&value, &mut blanks.into_iter().cycle(), &mut text);
    Written { text, value }
}

fn list() -> impl Strategy<Value = Written> {
    let plugins = prop::collection::vec(plugin(), 1..5);
    let others = prop::collection::vec(("[d-m][a-z]{0,4}", tree()), 0..3);
    (plugins, others, blank(), any::<bool>()).prop_map(|(plugins, others, blanks, last)| {
        let mut conf: Map<String, Value> = others.into_iter().collect();
        if !last {
            conf.insert("plugins".into(), plugins.clone().into());
        }
        conf.insert("cniVersion".into(), "1.0.0".into());
        conf.insert("name".into(), "net".into());
        conf.insert("plugins".into(), plugins.into());
        written(Value::Object(conf), blanks)
    })
}

fn lone() -> impl Strategy<Value = Written> {
    (plugin(), blank()).prop_map(|(plugin, blanks)| {
        let mut conf = plugin.as_object().unwrap().clone();
        conf.insert("cniVersion".into(), "0.3.1".into());
        conf.insert("name".into(), "net".into());
        written(Value::Object(conf), blanks)
    })
}

fn ours() -> Entry {
    Options::default().entry
}

proptest! {
    #[test]
    fn what_goes_in_comes_out_again_byte_for_byte(list in list()) {
        let conf = Conf::parse("a.conflist", list.text.as_bytes()).unwrap();
        let with = conf.chain(&ours()).unwrap();
        prop_assert_eq!(conflist::release("a.conflist", with.as_bytes()), Ok(Released::Edited(list.text.clone())));
        // As if it had been done on the values.
        let mut wanted = list.value.clone();
        wanted["plugins"].as_array_mut().unwrap().push(Value::Object(ours()));
        prop_assert_eq!(serde_json::from_str::<Value>(&with).unwrap(), wanted);
        let again = Conf::parse("a.conflist", with.as_bytes()).unwrap();
        prop_assert_eq!(again.chain(&ours()).unwrap(), with);
    }

    #[test]
    fn an_update_changes_our_entry_alone(list in list(), at in any::<prop::sample::Index>()) {
        let mut value = list.value.clone();
        let plugins = value["plugins"].as_array_mut().unwrap();
        let at = at.index(plugins.len() + 1);
        plugins.insert(at, serde_json::json!({"type": "culvert-cni", "old": [1, {"type": "x"}]}));
        let text = written(value.clone(), vec![" ".into(), "\n".into(), String::new()]).text;
        let after = Conf::parse("a.conflist", text.as_bytes()).unwrap().chain(&ours()).unwrap();
        value["plugins"][at] = Value::Object(ours());
        prop_assert_eq!(serde_json::from_str::<Value>(&after).unwrap(), value);
        let again = Conf::parse("a.conflist", after.as_bytes()).unwrap();
        prop_assert_eq!(again.chain(&ours()).unwrap(), after);
    }

    #[test]
    fn a_lone_configuration_comes_back_byte_for_byte(lone in lone()) {
        let conf = Conf::parse("a.conf", lone.text.as_bytes()).unwrap();
        let list = conf.wrap("a.conf", None, &ours()).unwrap();
        let value: Value = serde_json::from_str(&list).unwrap();
        prop_assert_eq!(&value["plugins"][0], &lone.value);
        prop_assert_eq!(&value["name"], "net");
        match conflist::release("a.conflist", list.as_bytes()) {
            Ok(Released::Unwrapped(was, text)) => {
                prop_assert_eq!(was.name, "a.conf");
                prop_assert_eq!(text, lone.text);
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn nothing_panics_and_what_is_written_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in any::<prop::sample::Index>(), list in list()) {
        for name in ["a.conflist", "a.conf"] {
            let _ = conflist::release(name, &bytes);
            prop_assert!(Conf::parse(name, &bytes).is_err());
        }
        // Cut off, or with one byte changed.
        let mut text = list.text.into_bytes();
        let at = cut.index(text.len());
        let _ = conflist::release("a.conflist", &text[..at]);
        text[at] = text[at].wrapping_add(1);
        let _ = conflist::release("a.conflist", &text);
        if let Ok(conf) = Conf::parse("a.conflist", &text)
            && let Ok(with) = conf.chain(&ours())
        {
            prop_assert!(Conf::parse("a.conflist", with.as_bytes()).is_ok());
        }
    }
}
