//! `cargo xtask load`: the node programs into this kernel, and what the verifier made of each.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    bins,
    cmd::output,
    host,
    project::{Profile, Project},
};

/// Runs the verb.
pub(crate) fn main() -> Result<()> {
    host::require_root("load")?;
    let project = Project::find();
    bins::ensure(&project, Profile::Dev, &["culvert"])?;
    host::ensure_bpffs()?;
    let report =
        output(bins::command(&project, Profile::Dev, "culvert").args(["load", "-o", "json"]))?;
    print!("{}", table(&report)?);
    println!("undo with: cargo xtask unload");
    Ok(())
}

/// One line a program, from the report of `culvert load -o json`.
fn table(report: &str) -> Result<String> {
    let report: Value =
        serde_json::from_str(report).context("`culvert load -o json` did not print JSON")?;
    let programs = report
        .get("programs")
        .and_then(Value::as_array)
        .context("`culvert load -o json` printed no `programs`")?;
    let mut text = format!(
        "{:<18} {:>10} {:>14} {:>12}\n",
        "program", "bytes", "verified insns", "load time"
    );
    for program in programs {
        let name = program
            .get("name")
            .and_then(Value::as_str)
            .context("a program without a name")?;
        let number = |key: &str| {
            program
                .get(key)
                .and_then(Value::as_u64)
                .with_context(|| format!("program `{name}` without `{key}`"))
        };
        text += &format!(
            "{name:<18} {:>10} {:>14} {:>9.1} ms\n",
            number("bytes_xlated")?,
            number("verified_instructions")?,
            // Microseconds of a program load: far below what a float holds exactly.
            number("load_time_us")? as f64 / 1000.0,
        );
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_one_line_a_program() {
        let report = r#"{"programs":[{"name":"culvert_connect","tag":"00","bytes_xlated":1234,
            "verified_instructions":567,"load_time_us":2500}]}"#;
        let text = table(report).unwrap();
        assert_eq!(text.lines().count(), 2);
        let line = text.lines().nth(1).unwrap();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>(),
            ["culvert_connect", "1234", "567", "2.5", "ms"]
        );
    }

    #[test]
    fn a_report_with_a_hole_is_an_error_that_names_it() {
        let error = table(r#"{"programs":[{"name":"x","bytes_xlated":1}]}"#).unwrap_err();
        assert!(
            error.to_string().contains("verified_instructions"),
            "{error}"
        );
        assert!(table("{}").is_err());
    }
}
