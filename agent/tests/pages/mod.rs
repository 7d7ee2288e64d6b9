//! Pages of docs/ that are made from the code: compared with their files, or written.

use std::{fs, path::Path};

/// Compares a page with its file; `CULVERT_BLESS` in the environment of `test` writes it instead.
pub(crate) fn same(target: &str, name: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name);
    if std::env::var_os("CULVERT_BLESS").is_some() {
        fs::write(&path, page).unwrap();
        return;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let differs = kept.lines().zip(page.lines()).find(|(a, b)| a != b);
    assert!(
        kept == page,
        "docs/{name} is not what the code says: {differs:?}; write it anew with \
         `CULVERT_BLESS=1 cargo test -p culvert {target}`"
    );
}
