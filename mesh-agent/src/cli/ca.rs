//! `mesh-agent ca`: makes the certificate authority that all hosts of a mesh share.
//!
//! Must not know how certificates are issued.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    time::SystemTime,
};

use anyhow::Context as _;
use clap::Subcommand;
use mesh_core::id::TrustDomain;

use crate::identity::local_ca;

/// `mesh-agent ca …`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Make a new CA: a sealed bundle and the join token that opens it.
    ///
    /// Copy both files to every host of the mesh. Whoever has both can issue any identity of the trust domain, so keep
    /// the join token in a secret store and readable by the agent alone.
    Init(InitArgs),
}

#[derive(Debug, clap::Args)]
struct InitArgs {
    /// The trust domain that all identities are in, such as `prod.example.com`.
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Directory for `ca-bundle.pem` and `join-token`; made where it is missing. Existing files are never overwritten.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Does what the arguments say and prints what to do next.
///
/// # Errors
/// The files exist or cannot be written.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        CaCommand::Init(args) => init(&args),
    }
}

fn init(args: &InitArgs) -> anyhow::Result<()> {
    let created = local_ca::init(&args.trust_domain, &args.out, SystemTime::now())
        .with_context(|| format!("cannot make a CA for {} in {}", args.trust_domain, args.out.display()))?;
    writeln!(
        io::stdout(),
        "CA bundle   {}\njoin token  {}\n\n\
         Copy both to every host of the mesh, and name them in its agent.toml:\n\n\
         [identity]\ntrust_domain = \"{}\"\nca_bundle = \"{0}\"\njoin_token_file = \"{1}\"\n\n\
         Keep the join token secret: with it, any identity of the trust domain can be issued.",
        created.bundle.display(),
        created.token.display(),
        args.trust_domain,
    )
    .context("cannot print")
}
