//! Where traces go: one kind of value, the address of an OTLP collector.
//!
//! Accepts what OTLP's own variables may hold and the exporter can use; nothing is looked up or reached here.

use http::Uri;

use super::values::Value;

/// Port of OTLP over gRPC.
const PORT: u16 = 4317;

/// A collector that takes OTLP over gRPC: `http://HOST:PORT`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Collector(String);

impl Collector {
    /// As a URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.0
    }
}

impl Value for Collector {
    const SHAPE: &'static str = "http://HOST[:PORT]";

    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        // As OTLP's variables allow for gRPC.
        let whole = match text.contains("://") {
            true => text.to_owned(),
            false => format!("http://{text}"),
        };
        let wrong = || format!("`{text}` is no address such as http://10.0.0.1:{PORT}");
        let uri: Uri = whole.parse().map_err(|_| wrong())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(format!(
                    "`{text}` asks for TLS, which is not spoken here: name a collector on the node or in the cluster by \
                     http, and let that one send on"
                ));
            }
            _ => return Err(wrong()),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(format!(
                "`{text}` has a path, which OTLP over gRPC has not: leave it out, and give the port of gRPC ({PORT}, not \
                 4318)"
            ));
        }
        let authority = uri.authority().ok_or_else(wrong)?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(wrong());
        }
        // `host:` has no port either, and one out of range is no number here.
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => PORT,
            Some(rest) => rest.trim_start_matches(':').parse().map_err(|_| wrong())?,
            None => return Err(wrong()),
        };
        if port == 0 {
            return Err(wrong());
        }
        Ok(Self(format!("http://{}:{port}", authority.host())))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_otlp_s_variables_hold_is_taken_if_it_can_be_reached() {
        for (text, expected) in [
            ("http://10.0.0.1:4317", "http://10.0.0.1:4317"),
            ("http://otel.example:14317/", "http://otel.example:14317"),
            ("http://otel.example", "http://otel.example:4317"),
            ("otel.example:4317", "http://otel.example:4317"),
            ("http://[fd00::1]:4317", "http://[fd00::1]:4317"),
            ("http://[fd00::1]", "http://[fd00::1]:4317"),
        ] {
            let collector = Collector::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(collector.url(), expected);
            assert_eq!(Collector::parse(&collector.show()), Ok(collector));
        }
        for (text, expected) in [
            ("https://otel.example:4317", "TLS"),
            ("http://otel.example:4318/v1/traces", "path"),
            ("http://user:word@otel.example", "address"),
            ("grpc://otel.example", "address"),
            ("unix:///run/otel.sock", "address"),
            ("http://otel.example:70000", "address"),
            ("http://otel.example:0", "address"),
            ("http://", "address"),
            ("", "address"),
        ] {
            let why = Collector::parse(text).unwrap_err();
            assert!(why.contains(expected), "{text}: {why}");
        }
    }
}
