//! Rules, routes and steps as `ip` would say them.

use std::fmt;

use super::*;

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V4 {
            "-4"
        } else {
            "-6"
        };
        write!(f, "rule {family} pref {}", self.pref)?;
        if let Some((value, mask)) = self.mark {
            write!(f, " fwmark {value:#x}/{mask:#x}")?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if let Some(proto) = self.ip_proto {
            write!(f, " ipproto {proto}")?;
        }
        match self.action {
            Action::Table(LOCAL_TABLE) => f.write_str(" lookup local"),
            Action::Table(table) => write!(f, " lookup {table}"),
            Action::Unreachable => f.write_str(" unreachable"),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V4 {
            "-4"
        } else {
            "-6"
        };
        let kind = if self.kind == RouteKind::Local {
            "local"
        } else {
            "blackhole"
        };
        write!(f, "route {family} {kind} ")?;
        match self.destination {
            Some(destination) => write!(f, "{destination}")?,
            None => f.write_str("default")?,
        }
        if let Some(oif) = self.oif {
            write!(f, " dev #{oif}")?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        write!(f, " metric {} table ", self.metric)?;
        match self.table {
            LOCAL_TABLE => f.write_str("local"),
            table => write!(f, "{table}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddRule(r) => write!(f, "add {r}"),
            Self::DelRule(r) => write!(f, "del {r}"),
            Self::AddRoute(r) => write!(f, "add {r}"),
            Self::DelRoute(r) => write!(f, "del {r}"),
        }
    }
}
