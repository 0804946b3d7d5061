//! All integration tests, in one binary. A module per behaviour; its first segment names the tier it needs.

mod aws;
mod consul;
mod deploy;
mod docker;
mod following;
mod kernel;
mod netns;
mod registering;
