//! The `isqrt` command: parses flags, draws progress, prints. The work is in the libraries.
//!
//! Results go to standard output (one JSON object a line with `--json`), progress and errors to
//! standard error. Exit code 1 with one line `error: ...` when something fails, 2 for wrong usage.

mod allocator;
mod commands;
mod output;
mod plot;
mod progress;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use isqrt_train::without_backtrace;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::prelude::*;

/// Second-order pooling by iterative matrix square root (iSQRT-COV): reproduce, compare, time.
#[derive(Parser)]
#[command(
    name = "isqrt",
    version,
    about,
    after_help = "Example:\n  isqrt reproduce --dry-run"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// Flags of every command.
#[derive(Args)]
struct Common {
    /// One JSON object a line on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Threads to use [default: all cores]
    #[arg(long, global = true, value_name = "T", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

// Each command's own documentation is its help; one here would replace it, paragraphs included.
#[derive(Subcommand)]
enum Command {
    Reproduce(commands::reproduce::Reproduce),
    Train(commands::train::Train),
    Eval(commands::eval::Eval),
    Iterations(commands::iterations::Iterations),
    /// Time the layer, what it replaces, networks, and the loading of images
    #[command(subcommand)]
    Bench(commands::bench::Bench),
    Report(commands::report::Report),
    Models(commands::models::Models),
    Convert(commands::convert::Convert),
    Features(commands::features::Features),
    Classify(commands::classify::Classify),
    /// Look at data sets: list, check, measure, make small ones
    #[command(subcommand)]
    Data(commands::data::Data),
    Doctor(commands::doctor::Doctor),
}

fn main() -> ExitCode {
    allocator::keep_memory();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(Ended::Done) => ExitCode::SUCCESS,
        Ok(Ended::Stopped) => ExitCode::from(130),
        // The reader of our output has gone, as `head` does: nothing is wrong.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed too; then there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes on one line, leaving out causes that the text already tells, and the
/// backtraces that candle's errors have behind them where `RUST_BACKTRACE` is set.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let cause = without_backtrace(&cause);
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// How a command ended.
enum Ended {
    Done,
    /// By Ctrl-C or a signal, in good order.
    Stopped,
}

fn run(cli: &Cli) -> anyhow::Result<Ended> {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // candle's pool for elementwise work waits by spinning, on the threads that our ops and trainings
        // beside each other need: a training on two threads is a fifth faster without it, two on one each
        // nearly twice as fast.
        // SAFETY: no other thread has been started yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    if let Some(threads) = cli.common.threads {
        // For candle's products of matrices.
        // SAFETY: no other thread has been started yet.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
        rayon::ThreadPoolBuilder::new()
            .num_threads(usize::from(threads))
            .build_global()?;
    }
    let trace = match &cli.command {
        Command::Train(train) => train.trace.as_deref(),
        _ => None,
    };
    let (chrome, _written_when_dropped) = match trace {
        Some(path) => {
            // The layer itself panics where there is no such folder.
            let file = std::fs::File::create(path)
                .with_context(|| format!("cannot write {}", path.display()))?;
            let (layer, guard) = tracing_chrome::ChromeLayerBuilder::new()
                .writer(file)
                .build();
            (Some(layer), Some(guard))
        }
        None => (None, None),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .with_filter(LevelFilter::WARN);
    tracing_subscriber::registry()
        .with(lines)
        .with(chrome.map(|layer| layer.with_filter(LevelFilter::INFO)))
        .init();
    let json = cli.common.json;
    let done = match &cli.command {
        Command::Train(c) => {
            return Ok(match c.run(json)? {
                true => Ended::Stopped,
                false => Ended::Done,
            });
        }
        Command::Eval(c) => c.run(json),
        Command::Reproduce(c) => c.run(json, cli.common.threads),
        Command::Iterations(c) => c.run(json),
        Command::Bench(c) => c.run(json),
        Command::Report(c) => c.run(json),
        Command::Models(c) => c.run(json),
        Command::Convert(c) => c.run(json),
        Command::Features(c) => c.run(json),
        Command::Classify(c) => c.run(json),
        Command::Data(c) => c.run(json),
        Command::Doctor(c) => c.run(json),
    };
    done.map(|()| Ended::Done)
}
