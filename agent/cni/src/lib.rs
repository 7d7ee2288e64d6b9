//! What the plugin and the agent say to each other: the one definition both are built from.
