//! What the AWS backends have in common: how often a host may ask.
//!
//! Must not know what is asked, nor the SDK.

pub mod pace;
pub mod rota;
