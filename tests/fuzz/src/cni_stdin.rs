//! What a container runtime hands the plugin: the first line is `CNI_ARGS`, the rest is stdin. A result is handed on to
//! the byte, and every refusal names a cure.

use culvert_cni::{
    api::Refusal,
    config::{self, Config, VERSIONS},
    environment,
};

/// A call of the plugin.
pub fn cni_stdin(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == b'\n');
    let (arguments, stdin) = (parts.next(), parts.next());
    if let Ok(arguments) = str::from_utf8(arguments.unwrap_or_default()) {
        match environment::pod(arguments) {
            Ok(Some(pod)) => {
                assert!(!pod.namespace.is_empty() && !pod.name.is_empty());
                assert!(arguments.contains(&pod.namespace) && arguments.contains(&pod.name));
            }
            Ok(None) => {}
            Err(refusal) => sensible(&refusal),
        }
    }
    let stdin = stdin.unwrap_or_default();
    match config::parse(stdin) {
        Ok(config) => accepted(stdin, &config),
        Err(refusal) => sensible(&refusal),
    }
}

fn accepted(stdin: &[u8], config: &Config) {
    assert!(VERSIONS.contains(&config.version));
    assert_eq!(config::version(stdin), Some(config.version));
    assert!((1..=100).contains(&config.entry.budget_seconds));
    let result = config.result();
    match &config.previous {
        Some(_) => {
            let came_in = stdin
                .windows(result.len())
                .any(|part| part == result.as_bytes());
            assert!(came_in, "{result:?}");
        }
        None => assert_eq!(result, format!(r#"{{"cniVersion":"{}"}}"#, config.version)),
    }
    if let Err(refusal) = config.addresses() {
        sensible(&refusal);
    }
}

fn sensible(refusal: &Refusal) {
    assert!(refusal.code != 0 && !refusal.message.is_empty());
    assert!(refusal.cure.len() > 10, "{refusal}");
    assert!(refusal.message.len() < 1000, "{refusal}");
}
