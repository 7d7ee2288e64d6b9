//! The chained CNI plugin `culvert-cni`. At this stage it answers VERSION and refuses everything else.
//!
//! There is no agent to ask yet, and a plugin that cannot know whether a pod belongs to the mesh must not
//! let it start: ADD fails with code 11 ("try again later"). Nothing installs it so far.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

const VERSIONS: &str = r#"["0.3.1","0.4.0","1.0.0","1.1.0"]"#;

fn main() -> ExitCode {
    let (answer, code) = answer(&std::env::var("CNI_COMMAND").unwrap_or_default());
    match writeln!(io::stdout(), "{answer}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What goes to stdout: a result, or the error object of the CNI specification.
fn answer(command: &str) -> (String, ExitCode) {
    let error = |code: u32, message: &str| {
        (
            format!(r#"{{"cniVersion":"1.1.0","code":{code},"msg":"{message}"}}"#),
            ExitCode::FAILURE,
        )
    };
    match command {
        "VERSION" => (
            format!(r#"{{"cniVersion":"1.1.0","supportedVersions":{VERSIONS}}}"#),
            ExitCode::SUCCESS,
        ),
        // Deleting must never hold up a pod's end, and nothing was added.
        "DEL" | "GC" => (String::new(), ExitCode::SUCCESS),
        "ADD" | "CHECK" | "STATUS" => error(
            11,
            "culvert-cni cannot enrol pods in this release: enrol by hand with `culvert netns attach`",
        ),
        "" => error(
            4,
            "CNI_COMMAND is not set: this program is run by a container runtime",
        ),
        _ => error(
            4,
            "CNI_COMMAND is none of ADD, DEL, CHECK, GC, STATUS, VERSION",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_lists_what_the_specification_numbers() {
        assert_eq!(
            answer("VERSION").0,
            r#"{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}"#
        );
    }

    #[test]
    fn a_pod_never_starts_open() {
        assert!(answer("ADD").0.contains(r#""code":11"#));
        assert_eq!(answer("ADD").1, ExitCode::FAILURE);
        assert_eq!(answer("DEL"), (String::new(), ExitCode::SUCCESS));
        assert_eq!(answer("nonsense").1, ExitCode::FAILURE);
    }
}
