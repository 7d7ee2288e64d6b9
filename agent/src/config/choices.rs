//! Values that are one of a few words.

use super::values::Value;

macro_rules! choice {
    ($(#[$meta:meta])* $name:ident, $shape:literal { $( $(#[$variant_meta:meta])* $variant:ident = $word:literal $(| $also:literal)* ),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $( $(#[$variant_meta])* $variant ),+ }

        impl Value for $name {
            const SHAPE: &'static str = $shape;

            fn parse(text: &str) -> Result<Self, String> {
                match text {
                    $( $word $(| $also)* => Ok(Self::$variant), )+
                    _ => Err(format!("`{text}` is none of {}", $shape.replace('|', ", "))),
                }
            }

            fn show(&self) -> String {
                match self { $( Self::$variant => $word ),+ }.to_owned()
            }
        }
    };
}

choice! {
    /// Whether the installer keeps a list of plugins of its own.
    OwnConfig, "auto|true|false" {
        /// Beside a CNI that rewrites its file.
        Auto = "auto",
        /// Always.
        Always = "true" | "1" | "t" | "T" | "TRUE" | "True",
        /// Never.
        Never = "false" | "0" | "f" | "F" | "FALSE" | "False",
    }
}

choice! {
    /// Which DNS queries go to ztunnel.
    DnsScope, "all|resolv-conf" {
        /// All to port 53.
        All = "all",
        /// Those to the resolvers in the pod's `resolv.conf`.
        ResolvConf = "resolv-conf",
    }
}

choice! {
    /// Whose connections count as probes.
    ProbeSource, "kubelet|node|none" {
        /// The kubelet's.
        Kubelet = "kubelet",
        /// Every process's in the node's network namespace.
        Node = "node",
        /// Nobody's.
        None = "none",
    }
}

choice! {
    /// What the plugin lets start while the agent is away.
    AgentAway, "strict|decisions" {
        /// Only pods in excluded namespaces.
        Strict = "strict",
        /// Also those that the last decisions put outside the mesh.
        Decisions = "decisions",
    }
}

choice! {
    /// How events are logged.
    LogFormat, "json|text" {
        /// One JSON object a line.
        Json = "json",
        /// For people.
        Text = "text",
    }
}
