//! CNI configurations of others, into which our entry goes and out of which it comes again.

use culvert::install::{
    Options,
    conflist::{Conf, PLUGIN, Released, is_istio, release},
};

/// The same text as a list and as a lone configuration.
///
/// # Panics
///
/// When what went in does not come out byte for byte, or what we wrote is not what we would write again.
pub fn conflist(data: &[u8]) {
    let entry = Options::default().entry;
    let _ = release("10-a.conflist", data);
    let _ = release("10-a.conf", data);
    if let Ok(conf) = Conf::parse("10-a.conflist", data)
        && let Ok(with) = conf.chain(&entry)
    {
        let again = Conf::parse("10-a.conflist", with.as_bytes()).and_then(|c| c.chain(&entry));
        assert_eq!(again.as_ref(), Ok(&with), "twice is the same as once");
        let untouched = |t: &String| t != PLUGIN && !is_istio(t);
        if conf.types().iter().all(untouched) {
            let text = String::from_utf8_lossy(data).into_owned();
            assert_eq!(
                release("10-a.conflist", with.as_bytes()),
                Ok(Released::Edited(text))
            );
            let own = conf.own_list("10-a.conflist", &entry);
            let own = own.unwrap_or_default();
            assert_eq!(
                release("00-culvert.conflist", own.as_bytes()),
                Ok(Released::Nothing)
            );
        }
    }
    if let Ok(conf) = Conf::parse("10-a.conf", data)
        && let Ok(list) = conf.wrap("10-a.conf", None, &entry)
    {
        let back = release("10-a.conflist", list.as_bytes());
        assert!(
            matches!(&back, Ok(Released::Unwrapped(was, text)) if was.name == "10-a.conf" && text.as_bytes() == data),
            "{back:?}"
        );
    }
}
