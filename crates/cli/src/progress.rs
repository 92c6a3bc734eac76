//! Progress on standard error: bars with the time left in a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use isqrt_experiments::record::Record;
use isqrt_experiments::run::{Progress, Step};
use isqrt_experiments::stats::{duration, show};
use isqrt_train::data::DataInfo;
use isqrt_train::run::Console;
use isqrt_train::{EpochMetrics, Spec, StepInfo, counted};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bars or lines.
pub struct Display {
    bars: Option<Bars>,
    json: bool,
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

    /// How far all of it is.
    fn place(&self, step: &Step<'_>) {
        let done = 1000 * step.done / step.of.max(1);
        self.all.set_position(done as u64);
        let left = duration(step.seconds_left);
        self.all.set_message(format!(
            "{} of {} cells done, about {left} left",
            step.done, step.of
        ));
    }
}

impl Progress for Display {
    fn started(&mut self, step: &Step<'_>) {
        let left = duration(step.seconds_left);
        if let Some(bars) = &self.bars {
            bars.place(step);
            bars.cell.set_position(0);
            bars.cell.set_message(label(step));
        } else {
            say(&format!(
                "[{}/{}] {} (about {left} left)",
                step.number,
                step.of,
                label(step)
            ));
        }
    }

    fn tick(&mut self, step: &Step<'_>, fraction: f64, words: &str) -> ControlFlow<()> {
        // Of the trainings beside each other the bar shows whichever told last.
        if let Some(bars) = &self.bars {
            bars.cell.set_position((fraction * 1000.0) as u64);
            bars.cell.set_message(format!("{} {words}", label(step)));
        }
        ControlFlow::Continue(())
    }

    fn finished(&mut self, step: &Step<'_>, record: &Record) {
        if self.json {
            // If nobody reads any more, the records on disk are still complete.
            let _ = crate::output::json(record);
        }
        let main = &record.main;
        let value = match main.words.as_str() {
            "" => format!("{} {}", show(main.value, None), main.unit),
            words => words.to_owned(),
        };
        let result = format!(
            "{}: {} {value}, {}",
            label(step),
            main.metric,
            duration(record.seconds)
        );
        match &self.bars {
            Some(bars) => {
                bars.place(step);
                // Keeps the line above the bars.
                bars.all.println(format!("  {result}"));
            }
            None => say(&format!("[{}/{}] {result}", step.number, step.of)),
        }
    }
}

fn label(step: &Step<'_>) -> String {
    let seed = step.seed.map_or_else(String::new, |s| format!(" seed {s}"));
    format!("{} {}{seed}", step.experiment, step.cell)
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

/// Whether somebody wants the program to stop, by Ctrl-C or a signal of the system.
static STOP: AtomicBool = AtomicBool::new(false);

/// A training run: a bar in a terminal, a line now and then elsewhere. Ctrl-C ends it after the step that
/// is under way; a second one at once.
pub struct Training {
    bar: Option<ProgressBar>,
    error: Option<f64>,
    /// Since the bar's text or the last line, and what has happened since.
    shown: Instant,
    images: u64,
    seconds: f64,
    waited: f64,
    loss: f64,
    began: Option<(Instant, u64)>,
}

impl Training {
    /// Says what is going to run.
    pub fn start(spec: &Spec, data: &DataInfo) -> anyhow::Result<Self> {
        // Only one handler a process; there is one training run in it.
        ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::SeqCst) {
                #[allow(clippy::exit)]
                // The step under way may take long, and it was asked for twice.
                std::process::exit(130);
            }
            say("stopping after this step; once more to stop at once");
        })?;
        say(&format!(
            "{} on {}: {} images to train on, {} to evaluate on, {} classes; {}",
            spec.config(data.classes).model.short_name(),
            data.name,
            data.train,
            data.eval,
            data.classes,
            counted(spec.epochs, "epoch")
        ));
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("  {bar:24.cyan/dim} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("━╸─");
            ProgressBar::new(1).with_style(style)
        });
        Ok(Self {
            bar,
            error: None,
            shown: Instant::now(),
            images: 0,
            seconds: 0.0,
            waited: 0.0,
            loss: 0.0,
            began: None,
        })
    }

    /// Counts anew.
    fn restart(&mut self) {
        (self.images, self.seconds, self.waited, self.loss) = (0, 0.0, 0.0, 0.0);
    }

    /// Removes the bar.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Console for Training {
    fn say(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    fn step(&mut self, step: &StepInfo) -> ControlFlow<()> {
        self.images += step.images;
        self.seconds += step.seconds;
        self.waited += step.waited;
        self.loss += step.loss * step.images as f64;
        let (began, first) = *self.began.get_or_insert((Instant::now(), step.step));
        let every = match &self.bar {
            Some(_) => Duration::from_millis(200),
            None => Duration::from_secs(10),
        };
        if self.shown.elapsed() >= every {
            let done = step.step - first;
            let left = match done {
                0 => String::new(),
                done => {
                    let each = began.elapsed().as_secs_f64() / done as f64;
                    format!(
                        ", {} left",
                        duration(each * (step.steps - step.step) as f64)
                    )
                }
            };
            let error = self
                .error
                .map_or_else(String::new, |error| format!(", error {error:.2} %"));
            let text = format!(
                "epoch {}/{}, step {}/{}: loss {:.3}{error}, {:.1} images/s, {:.0} % waiting for data{left}",
                step.epoch,
                step.epochs,
                step.step,
                step.steps,
                self.loss / self.images.max(1) as f64,
                self.images as f64 / self.seconds.max(1e-9),
                100.0 * self.waited / self.seconds.max(1e-9),
            );
            match &self.bar {
                Some(bar) => {
                    bar.set_length(step.steps);
                    bar.set_position(step.step);
                    bar.set_message(text);
                }
                None => say(&text),
            }
            self.shown = Instant::now();
            self.restart();
        }
        match STOP.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn epoch(&mut self, metrics: &EpochMetrics) -> ControlFlow<()> {
        self.error = metrics.eval_error.or(self.error);
        let error = metrics
            .eval_error
            .map_or_else(String::new, |error| format!(", error {error:.2} %"));
        let text = format!(
            "epoch {}: loss {:.4}, training error {:.2} %{error}, {:.1} images/s, {}",
            metrics.epoch,
            metrics.train_loss,
            metrics.train_error,
            metrics.images_per_second,
            duration(metrics.seconds)
        );
        self.say(&text);
        // What is shown within an epoch is of that epoch.
        self.restart();
        match STOP.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// A line on standard error.
pub fn say(text: &str) {
    // Nobody to tell if this fails.
    let _ = writeln!(std::io::stderr(), "{text}");
}
