//! Where things are in a JSON text, so that an edit touches nothing but what it means to.
//!
//! Only for text that `serde_json` has accepted: it finds, it does not check.

use std::ops::Range;

/// One `"key": value` of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) key: String,
    pub(super) value: Range<usize>,
}

/// The members of the object at `object`, in order, repeated keys included.
pub(super) fn members(text: &str, object: Range<usize>) -> Vec<Member> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = skip_blank(bytes, object.start + 1);
    while at < object.end && bytes.get(at) == Some(&b'"') {
        let key_end = end_of(bytes, at);
        let key = text
            .get(at..key_end)
            .and_then(|k| serde_json::from_str(k).ok())
            .unwrap_or_default();
        // The colon, then the value.
        let start = skip_blank(bytes, skip_blank(bytes, key_end) + 1);
        let end = end_of(bytes, start);
        found.push(Member {
            key,
            value: start..end,
        });
        at = skip_blank(bytes, end);
        if bytes.get(at) == Some(&b',') {
            at = skip_blank(bytes, at + 1);
        }
    }
    found
}

/// The elements of the array at `array`, in order.
pub(super) fn elements(text: &str, array: Range<usize>) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = skip_blank(bytes, array.start + 1);
    while at < array.end && bytes.get(at).is_some_and(|b| *b != b']') {
        let end = end_of(bytes, at);
        found.push(at..end);
        at = skip_blank(bytes, end);
        if bytes.get(at) == Some(&b',') {
            at = skip_blank(bytes, at + 1);
        }
    }
    found
}

/// The one value of a whole text, without the blanks around it.
pub(super) fn whole(text: &str) -> Range<usize> {
    let start = skip_blank(text.as_bytes(), 0);
    start..end_of(text.as_bytes(), start)
}

fn skip_blank(bytes: &[u8], mut at: usize) -> usize {
    while matches!(bytes.get(at), Some(b' ' | b'\t' | b'\r' | b'\n')) {
        at += 1;
    }
    at
}

/// Behind the value that starts at `at`.
fn end_of(bytes: &[u8], at: usize) -> usize {
    match bytes.get(at) {
        Some(b'"') => end_of_string(bytes, at),
        Some(b'{' | b'[') => end_of_nested(bytes, at),
        _ => {
            let rest = bytes.get(at..).unwrap_or_default();
            let ends = |b: &u8| matches!(b, b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n');
            at + rest.iter().position(ends).unwrap_or(rest.len())
        }
    }
}

fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    loop {
        match bytes.get(at) {
            Some(b'\\') => at += 2,
            Some(b'"') => return at + 1,
            Some(_) => at += 1,
            None => return bytes.len(),
        }
    }
}

fn end_of_nested(bytes: &[u8], start: usize) -> usize {
    let mut at = start;
    let mut depth = 0_usize;
    loop {
        match bytes.get(at) {
            Some(b'"') => {
                at = end_of_string(bytes, at);
                continue;
            }
            Some(b'{' | b'[') => depth += 1,
            Some(b'}' | b']') => depth = depth.saturating_sub(1),
            Some(_) => {}
            None => return bytes.len(),
        }
        at += 1;
        if depth == 0 {
            return at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_whatever_they_look_like() {
        let text = r#" { "a" : 1 ,"\u0062":"x,\"}" , "c":{"d":[1,{"e":null}]},"c": [ ] } "#;
        let at = whole(text);
        assert_eq!(&text[at.clone()], text.trim());
        let found: Vec<(String, &str)> = members(text, at)
            .into_iter()
            .map(|m| (m.key, &text[m.value]))
            .collect();
        assert_eq!(
            found,
            [
                ("a".into(), "1"),
                ("b".into(), r#""x,\"}""#),
                ("c".into(), r#"{"d":[1,{"e":null}]}"#),
                ("c".into(), "[ ]"),
            ]
        );
    }

    #[test]
    fn elements_are_found_in_order() {
        let text = r#"[ {"a":"]"} ,true,[1,2], "é" ]"#;
        let found: Vec<&str> = elements(text, whole(text))
            .into_iter()
            .map(|r| &text[r])
            .collect();
        assert_eq!(found, [r#"{"a":"]"}"#, "true", "[1,2]", "\"é\""]);
        assert!(elements("[ ]", 0..3).is_empty());
    }
}
