//! Progress on standard error: bars with the time left in a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use isqrt_experiments::record::Record;
use isqrt_experiments::run::{Progress, Step};
use isqrt_experiments::stats::{duration, show};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;

/// Bars or lines.
pub struct Display {
    bars: Option<Bars>,
    json: bool,
    label: String,
    number: usize,
    of: usize,
}

struct Bars {
    all: ProgressBar,
    cell: ProgressBar,
    _screen: MultiProgress,
}

impl Display {
    /// Bars if standard error is a terminal; each record as a JSON line if `json`.
    pub fn new(json: bool) -> Self {
        Self {
            bars: std::io::stderr().is_terminal().then(Bars::new),
            json,
            label: String::new(),
            number: 0,
            of: 0,
        }
    }

    /// Removes the bars.
    pub fn end(&self) {
        if let Some(bars) = &self.bars {
            bars.cell.finish_and_clear();
            bars.all.finish_and_clear();
        }
    }
}

impl Bars {
    fn new() -> Self {
        let screen = MultiProgress::new();
        let bar = |template: &str| {
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸─");
            screen.add(ProgressBar::new(1000).with_style(style))
        };
        Self {
            cell: bar("  {bar:24.cyan/dim} {msg}"),
            all: bar("  {bar:24.green/dim} {msg}"),
            _screen: screen,
        }
    }
}

impl Progress for Display {
    fn started(&mut self, step: &Step<'_>) {
        let seed = step.seed.map_or_else(String::new, |s| format!(" seed {s}"));
        self.label = format!("{} {}{seed}", step.experiment, step.cell);
        (self.number, self.of) = (step.number, step.of);
        let left = duration(step.seconds_left);
        if let Some(bars) = &self.bars {
            let done = 1000 * (step.number.saturating_sub(1)) / step.of.max(1);
            bars.all.set_position(done as u64);
            bars.all.set_message(format!(
                "cell {} of {}, about {left} left",
                step.number, step.of
            ));
            bars.cell.set_position(0);
            bars.cell.set_message(self.label.clone());
        } else {
            say(&format!(
                "[{}/{}] {} (about {left} left)",
                step.number, step.of, self.label
            ));
        }
    }

    fn tick(&mut self, fraction: f64, words: &str) -> ControlFlow<()> {
        if let Some(bars) = &self.bars {
            bars.cell.set_position((fraction * 1000.0) as u64);
            bars.cell.set_message(format!("{} {words}", self.label));
        }
        ControlFlow::Continue(())
    }

    fn finished(&mut self, record: &Record) {
        if self.json {
            // If nobody reads any more, the records on disk are still complete.
            let _ = crate::output::json(record);
        }
        let result = format!(
            "{}: {} {} {}, {}",
            self.label,
            record.main.metric,
            show(record.main.value, None),
            record.main.unit,
            duration(record.seconds)
        );
        match &self.bars {
            Some(bars) => {
                // Keeps the line above the bars.
                bars.all.println(format!("  {result}"));
            }
            None => say(&format!("[{}/{}] {result}", self.number, self.of)),
        }
    }
}

/// Counts things that are done, from any thread: a bar in a terminal, nothing elsewhere.
pub struct Counter(Option<ProgressBar>);

impl Default for Counter {
    fn default() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let template = "  {bar:24.cyan/dim} {msg} {human_pos} of {human_len}, {eta} left";
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━╸─");
        Self(Some(ProgressBar::new(0).with_style(style)))
    }
}

impl Counter {
    /// So many of `total` are done in this step.
    pub fn at(&self, step: &'static str, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            if bar.length() != Some(total) || bar.message() != step {
                bar.reset();
                bar.set_length(total);
                bar.set_message(step);
            }
            bar.set_position(done);
        }
    }

    /// Removes the bar.
    pub fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// A line on standard error.
pub fn say(text: &str) {
    // Nobody to tell if this fails.
    let _ = writeln!(std::io::stderr(), "{text}");
}
