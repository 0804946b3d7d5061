//! The project's own commands: build the kernel object, test, check, measure, demonstrate.
//! It reads files and runs programs; it must not depend on any crate of the mesh, so that it builds before them.

mod archive;
mod bench;
mod build_ebpf;
mod demo;
mod docs;
mod instructions;
mod layout;
mod packages;
mod process;
mod pypi;
mod test;
mod tidy;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, test, check, measure and demonstrate the mesh")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel programs and put the object where the agent embeds it
    BuildEbpf(build_ebpf::Args),
    /// Set the machine up and run the tests: every tier, and the kernel tier on other kernels
    Test(test::Args),
    /// Show the main job: two hosts, unmodified tasks, one mesh; ends by itself and leaves nothing
    Demo(demo::Args),
    /// Check the rules of the house that no compiler checks
    Tidy,
    /// Write the documents that are made from code
    Docs,
    /// Run a benchmark; without a name, list them
    Bench(bench::Args),
    /// Note which functions the agent runs, and write the order in which a release links them
    Layout,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::BuildEbpf(args) => build_ebpf::run(&args).map(|()| true),
        Command::Test(args) => test::run(&args),
        Command::Demo(args) => demo::run(args),
        Command::Tidy => tidy::run(),
        Command::Docs => docs::run().map(|()| true),
        Command::Bench(args) => bench::run(&args),
        Command::Layout => layout::run().map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        // What is wrong has been said, and what was said last shall stay last.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
