//! What the page of training runs says, before it has a form.

use super::folder::{EpochLine, Run};
use crate::machine::date;
use crate::report::model::{Drawing, Entry, Heading, Table};
use crate::report::plot::{LinePlot, Point, Series};
use crate::stats::{duration, show};
use serde::Serialize;
use serde_json::Value;

/// Points of a curve; more lines than these are drawn as means of neighbours.
const POINTS: usize = 400;
/// Looks whose spectrum is drawn.
const SPECTRA: usize = 6;
/// Eigenvalues below this share of the largest are rounding of 32-bit numbers.
const NOISE: f64 = 1e-9;
/// Classes, and confusions, that are shown.
const WORST: usize = 10;

/// The whole page.
#[derive(Serialize)]
pub(super) struct Page {
    /// Names of the runs.
    pub title: String,
    /// The runs beside each other.
    pub table: Table,
    /// Curves of all runs.
    pub groups: Vec<Group>,
    /// Run by run.
    pub runs: Vec<RunSection>,
}

/// Drawings under a heading.
#[derive(Serialize)]
pub(super) struct Group {
    pub title: String,
    /// What to know about them.
    pub note: String,
    pub figures: Vec<Drawing>,
}

/// What concerns one run.
#[derive(Serialize)]
pub(super) struct RunSection {
    pub name: String,
    pub title: String,
    /// Where it stands.
    pub status: String,
    /// What could not be read, and updates that were left out.
    pub warnings: Vec<String>,
    /// Folder, machine, data, time.
    pub facts: Vec<(String, String)>,
    /// Looks into the network.
    pub diagnostics: Option<Group>,
    /// Classes with the smallest share of right answers.
    pub worst: Option<Table>,
    /// The commonest wrong answers.
    pub confusions: Option<Table>,
    /// Epoch by epoch.
    pub epochs: Option<Table>,
    /// `spec.toml`.
    pub spec: String,
}

impl Page {
    pub fn new(runs: &[Run]) -> Self {
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        let title = match &names[..] {
            [one] => (*one).to_owned(),
            names => format!("{} runs", names.len()),
        };
        let groups = [over_epochs(runs), over_time(runs), over_updates(runs)];
        Self {
            title,
            table: overview(runs),
            groups: groups.into_iter().flatten().collect(),
            runs: runs.iter().map(section).collect(),
        }
    }
}

/// A number within JSON.
fn number(value: &Value, path: &str) -> Option<f64> {
    value.pointer(path).and_then(Value::as_f64)
}

/// A text within JSON; numbers and truth values as they are written there.
fn text(value: &Value, path: &str) -> Option<String> {
    match value.pointer(path)? {
        Value::String(text) => (!text.is_empty()).then(|| text.clone()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
        other => Some(other.to_string()),
    }
}

fn percent(value: Option<f64>) -> Option<Entry> {
    value.map(|x| plain(format!("{} %", show(x, Some(2)))))
}

fn plain(text: String) -> Entry {
    Entry {
        text,
        ..Entry::default()
    }
}

fn with_note(entry: Option<Entry>, note: Option<String>) -> Option<Entry> {
    let mut entry = entry?;
    entry.note = note.unwrap_or_default();
    Some(entry)
}

fn missing() -> Entry {
    Entry {
        text: "–".to_owned(),
        class: "missing".to_owned(),
        ..Entry::default()
    }
}

fn heading(label: &str, unit: &str) -> Heading {
    Heading {
        label: label.to_owned(),
        unit: unit.to_owned(),
        who: String::new(),
    }
}

fn label(text: &str) -> Entry {
    Entry {
        class: "label".to_owned(),
        ..plain(text.to_owned())
    }
}

/// A row of the table of runs: what it is called, and what a run says.
type Row = (&'static str, fn(&Run) -> Option<Entry>);

/// Rows that no run can fill are left out.
const ROWS: [Row; 21] = [
    ("status", |run| Some(label(&status(run)))),
    ("model", |run| model(run).map(|text| label(&text))),
    ("parameters", |run| {
        number(&run.result, "/parameters").map(|n| plain(grouped(n)))
    }),
    ("data", |run| {
        with_note(data_name(run).map(|text| label(&text)), data_sizes(run))
    }),
    ("epochs done", |run| {
        let done = done(run);
        let planned = run.spec.get("epochs").and_then(toml::Value::as_integer);
        let planned = planned.map(|n| format!(" of {n}")).unwrap_or_default();
        Some(plain(format!("{done}{planned}")))
    }),
    ("top-1 error, last epoch", |run| {
        let error = percent(last(run, |e| e.eval_error));
        with_note(error, part(run).map(str::to_owned))
    }),
    ("top-1 error, best epoch", |run| {
        let (epoch, error) = best(run)?;
        with_note(percent(Some(error)), Some(part_and_epoch(run, epoch)))
    }),
    ("top-5 error, last epoch", |run| {
        let error = percent(last(run, |e| e.eval_error5));
        with_note(error, part(run).map(str::to_owned))
    }),
    ("top-5 error, best epoch", |run| {
        let (epoch, _) = best(run)?;
        let line = run.epochs.iter().find(|e| e.epoch == epoch)?;
        with_note(percent(line.eval_error5), Some(part_and_epoch(run, epoch)))
    }),
    ("final top-1 error", |run| {
        let error = number(&run.result, "/final/error");
        with_note(percent(error), right(run, "/final/correct"))
    }),
    ("final top-5 error", |run| {
        let error = number(&run.result, "/final/error5");
        with_note(percent(error), right(run, "/final/correct5"))
    }),
    ("test top-1 error, best epoch", |run| {
        let error = number(&run.result, "/best/test/error");
        with_note(percent(error), right(run, "/best/test/correct"))
    }),
    ("final loss", |run| {
        number(&run.result, "/final/loss").map(|x| plain(show(x, None)))
    }),
    ("calibration error", |run| {
        let error = number(&run.result, "/final/calibration_error");
        error.map(|x| plain(show(x, None)))
    }),
    ("training loss, last epoch", |run| {
        last(run, |e| e.train_loss).map(|x| plain(show(x, None)))
    }),
    ("images/s", |run| speed(run).map(|x| plain(show(x, None)))),
    ("waiting for data", |run| {
        let share = last(run, |e| e.wait_share)?;
        let note = "of the last epoch's time".to_owned();
        let entry = plain(format!("{} %", show(100.0 * share, Some(1))));
        with_note(Some(entry), Some(note))
    }),
    ("wall time", |run| {
        wall_seconds(run).map(|s| plain(duration(s)))
    }),
    ("CPU time", |run| {
        let seconds = number(&run.result, "/cpu_seconds");
        let seconds = seconds.or_else(|| last(run, |e| e.cpu_seconds));
        seconds.map(|s| plain(duration(s)))
    }),
    ("peak memory", |run| {
        let mb = number(&run.result, "/peak_memory_mb");
        mb.map(|mb| plain(format!("{} MB", grouped(mb.round()))))
    }),
    ("device", |run| {
        let device = text(&run.environment, "/device");
        let threads = text(&run.environment, "/threads").map(|n| format!("{n} threads"));
        with_note(device.map(plain), threads)
    }),
];

fn overview(runs: &[Run]) -> Table {
    let mut head = vec![heading("", "")];
    head.extend(runs.iter().map(|run| heading(&run.name, &title(run))));
    let mut rows = Vec::new();
    for (name, value) in ROWS {
        let cells: Vec<Option<Entry>> = runs.iter().map(value).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().map(|c| c.unwrap_or_else(missing));
            rows.push(std::iter::once(label(name)).chain(cells).collect());
        }
    }
    Table { head, rows }
}

fn title(run: &Run) -> String {
    let title = run.spec.get("title").and_then(toml::Value::as_str);
    title.unwrap_or_default().to_owned()
}

fn status(run: &Run) -> String {
    match text(&run.result, "/status") {
        Some(status) => status,
        None if run.epochs.is_empty() && run.steps.is_empty() => "no numbers yet".to_owned(),
        None => "unfinished: still going, or killed".to_owned(),
    }
}

/// Backbone and representation, as in the spec.
fn model(run: &Run) -> Option<String> {
    let model = run.spec.get("model")?;
    let part = |key: &str| model.get(key).map(described);
    let parts = [part("backbone"), part("representation")];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(" + "))
}

/// `name` or `name (option = value, ...)`.
fn described(value: &toml::Value) -> String {
    match value {
        toml::Value::String(name) => name.clone(),
        toml::Value::Table(table) => {
            let name = table.get("name").map(described).unwrap_or_default();
            let options = table.iter().filter(|(key, _)| *key != "name");
            let options: Vec<String> = options.map(|(k, v)| format!("{k} = {v}")).collect();
            match options.is_empty() {
                true => name,
                false => format!("{name} ({})", options.join(", ")),
            }
        }
        other => other.to_string(),
    }
}

fn data_name(run: &Run) -> Option<String> {
    text(&run.environment, "/data/name").or_else(|| {
        let data = run.spec.get("data")?;
        let keys = ["name", "set", "root"].into_iter();
        let name = keys.filter_map(|key| data.get(key)?.as_str()).next();
        name.map(str::to_owned)
    })
}

fn data_sizes(run: &Run) -> Option<String> {
    let sizes = ["train", "eval", "test", "classes"].into_iter();
    let sizes = sizes.filter_map(|key| {
        let n = number(&run.environment, &format!("/data/{key}"))?;
        (n > 0.0).then(|| format!("{} {key}", grouped(n)))
    });
    let sizes: Vec<String> = sizes.collect();
    (!sizes.is_empty()).then(|| sizes.join(", "))
}

fn done(run: &Run) -> u64 {
    let epochs = run.result.pointer("/epochs").and_then(Value::as_u64);
    epochs.unwrap_or_else(|| run.epochs.last().map_or(0, |e| e.epoch))
}

/// The last epoch that has the number: not every epoch is evaluated.
fn last(run: &Run, of: impl Fn(&EpochLine) -> Option<f64>) -> Option<f64> {
    run.epochs.iter().rev().find_map(of)
}

/// Epoch and top-1 error, the first of equals.
fn best(run: &Run) -> Option<(u64, f64)> {
    let epoch = run.result.pointer("/best/epoch").and_then(Value::as_u64);
    let said = epoch.zip(number(&run.result, "/best/eval_error"));
    said.or_else(|| {
        let errors = run.epochs.iter();
        let errors = errors.filter_map(|e| Some((e.epoch, e.eval_error?)));
        errors.min_by(|a, b| a.1.total_cmp(&b.1))
    })
}

/// The part that epochs are evaluated on: validation, where the test part is another one.
fn part(run: &Run) -> Option<&'static str> {
    let data = run.environment.pointer("/data")?;
    Some(match number(data, "/test").is_some_and(|test| test > 0.0) {
        true => "on the validation part",
        false => "on the test part",
    })
}

/// What is said of an error of the best epoch.
fn part_and_epoch(run: &Run, epoch: u64) -> String {
    let parts = [Some(format!("epoch {epoch}")), part(run).map(str::to_owned)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Final numbers are of the test part.
fn right(run: &Run, path: &str) -> Option<String> {
    let (right, total) = number(&run.result, path).zip(number(&run.result, "/final/total"))?;
    let (right, total) = (grouped(right), grouped(total));
    Some(format!("on the test part, {right} of {total} right"))
}

/// Of the result, or else the mean of the epochs, or of the first epoch's lines.
fn speed(run: &Run) -> Option<f64> {
    let mean = |values: Vec<f64>| {
        let sum: f64 = values.iter().sum();
        (!values.is_empty()).then(|| sum / values.len() as f64)
    };
    let epochs = || run.epochs.iter().filter_map(|e| e.images_per_second);
    let steps = || run.steps.iter().filter_map(|s| s.images_per_second);
    number(&run.result, "/images_per_second")
        .or_else(|| mean(epochs().collect()))
        .or_else(|| mean(steps().collect()))
}

/// Wall time so far.
fn wall_seconds(run: &Run) -> Option<f64> {
    let epoch = last(run, |e| e.run_seconds);
    let step = run.steps.iter().rev().find_map(|s| s.seconds);
    let latest = [epoch, step].into_iter().flatten().reduce(f64::max);
    number(&run.result, "/wall_seconds").or(latest)
}

/// `1 234 567`, with thin spaces that do not break.
fn grouped(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digits.len() > 4 {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A curve. More lines than [`POINTS`] become means of neighbours.
fn series(label: &str, points: impl Iterator<Item = (f64, Option<f64>)>) -> Series {
    let points: Vec<(f64, f64)> = points.filter_map(|(x, y)| Some((x, y?))).collect();
    let together = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let (x, y) = part.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
        let n = part.len() as f64;
        let bar = None;
        Point {
            x: x / n,
            y: y / n,
            bar,
        }
    };
    let points: Vec<Point> = points.chunks(together).map(mean).collect();
    Series {
        label: shortened(label),
        level: false,
        // A line needs two.
        dots: points.len() < 3,
        points,
    }
}

/// A label that fits in the legend's width.
fn shortened(label: &str) -> String {
    const MOST: usize = 58;
    let letters: Vec<char> = label.chars().collect();
    match letters.len() > MOST {
        true => {
            let end: String = letters[letters.len() - MOST + 1..].iter().collect();
            format!("…{end}")
        }
        false => label.to_owned(),
    }
}

/// A drawing, where a curve has a point. Curves without one stay in the legend, so that a run has the same
/// colour everywhere.
fn drawing(
    title: &str,
    x_label: &str,
    y_label: &str,
    log: bool,
    all: Vec<Series>,
) -> Option<Drawing> {
    all.iter().any(|s| !s.points.is_empty()).then(|| Drawing {
        title: title.to_owned(),
        svg: LinePlot {
            title: title.to_owned(),
            x_label: x_label.to_owned(),
            y_label: y_label.to_owned(),
            log,
            log_x: false,
            series: all,
        }
        .svg(),
    })
}

fn group(title: &str, note: String, figures: Vec<Option<Drawing>>) -> Option<Group> {
    let figures: Vec<Drawing> = figures.into_iter().flatten().collect();
    (!figures.is_empty()).then(|| Group {
        title: title.to_owned(),
        note,
        figures,
    })
}

/// What is drawn of an epoch: heading, y axis, number.
type Curve = (&'static str, &'static str, fn(&EpochLine) -> Option<f64>);

const CURVES: [Curve; 3] = [
    ("Evaluation error", "top-1 error (%)", |e| e.eval_error),
    ("Training error", "top-1 error (%)", |e| e.train_error),
    ("Training loss", "loss", |e| e.train_loss),
];

fn curves(
    runs: &[Run],
    x_label: &str,
    place: impl Fn(&EpochLine) -> Option<f64>,
) -> Vec<Option<Drawing>> {
    let draw = |(title, y_label, of): Curve| {
        let of_run = |run: &Run| {
            let at = run.epochs.iter().filter_map(|e| Some((place(e)?, of(e))));
            series(&run.name, at)
        };
        drawing(
            title,
            x_label,
            y_label,
            false,
            runs.iter().map(of_run).collect(),
        )
    };
    CURVES.into_iter().map(draw).collect()
}

fn over_epochs(runs: &[Run]) -> Option<Group> {
    let note = "Training error and loss are means over an epoch, each batch before its update and as it was \
                augmented; the evaluation follows the epoch, on the validation part where there is one.";
    let figures = curves(runs, "epoch", |e| Some(e.epoch as f64));
    group("Over epochs", note.to_owned(), figures)
}

fn over_time(runs: &[Run]) -> Option<Group> {
    let longest = runs.iter().filter_map(|run| last(run, |e| e.run_seconds));
    let (unit, seconds) = match longest.fold(0.0, f64::max) {
        ..180.0 => ("s", 1.0),
        ..10_800.0 => ("min", 60.0),
        ..259_200.0 => ("h", 3600.0),
        _ => ("days", 86_400.0),
    };
    let note = "Wall time of training with its evaluations. Runs on different machines, or beside other \
                work, do not compare.";
    let figures = curves(runs, &format!("time ({unit})"), |e| {
        e.run_seconds.map(|s| s / seconds)
    });
    group("Over time", note.to_owned(), figures)
}

fn over_updates(runs: &[Run]) -> Option<Group> {
    let loss = |run: &Run| {
        let at = run.steps.iter().map(|s| (s.step as f64, s.loss));
        series(&run.name, at)
    };
    let rate = |run: &Run| {
        let at = run.steps.iter().map(|s| (s.step as f64, s.learning_rate));
        series(&run.name, at)
    };
    let distance = |run: &Run| {
        let at = run.looks.iter().map(|l| (l.step as f64, l.root_distance));
        series(&run.name, at)
    };
    let draw = |title, y_label, log, all: Vec<Series>| drawing(title, "updates", y_label, log, all);
    let all = |of: &dyn Fn(&Run) -> Series| runs.iter().map(of).collect::<Vec<Series>>();
    let together = runs
        .iter()
        .map(|run| run.steps.len().div_ceil(POINTS))
        .max();
    let note = match together {
        Some(n) if n > 1 => format!("A point is the mean of up to {n} lines of metrics.jsonl."),
        _ => String::new(),
    };
    let figures = vec![
        draw("Training loss", "loss", false, all(&loss)),
        draw("Learning rate", "learning rate", false, all(&rate)),
        draw(
            "Distance of the layer's output to the exact root",
            "relative distance, Frobenius norm",
            true,
            all(&distance),
        ),
    ];
    group("Over updates", note, figures)
}

fn section(run: &Run) -> RunSection {
    let mut warnings = run.warnings.clone();
    if let [first, ..] = &run.skipped[..] {
        warnings.push(format!(
            "{} updates were left out, the first after update {}: {}",
            run.skipped.len(),
            first.0,
            first.1
        ));
    }
    let (worst, confusions) = classes(run).unzip();
    RunSection {
        name: run.name.clone(),
        title: title(run),
        status: status(run),
        warnings,
        facts: facts(run),
        diagnostics: diagnostics(run),
        worst,
        confusions,
        epochs: epochs(run),
        spec: run.spec_text.clone(),
    }
}

fn facts(run: &Run) -> Vec<(String, String)> {
    let environment = |path: &str| text(&run.environment, path);
    let dirty = run.environment.pointer("/dirty") == Some(&Value::Bool(true));
    let changes = if dirty { ", with changes" } else { "" };
    let threads = environment("/cores").zip(environment("/threads"));
    let updates = number(&run.result, "/steps").or_else(|| {
        let epoch = run.epochs.last().map_or(0, |e| e.step);
        let step = run.steps.last().map_or(0, |s| s.step).max(epoch);
        (step > 0).then_some(step as f64)
    });
    let data = data_name(run).map(|name| match data_sizes(run) {
        Some(sizes) => format!("{name}: {sizes}"),
        None => name,
    });
    let started = run.environment.pointer("/started").and_then(Value::as_u64);
    let spec = |key: &str| Some(run.spec.get(key)?.as_str()?.to_owned());
    let facts = [
        ("folder", Some(run.folder.display().to_string())),
        ("recipe from", spec("source").filter(|s| !s.is_empty())),
        ("note", spec("note").filter(|s| !s.is_empty())),
        ("model", model(run)),
        ("data", data),
        ("data fingerprint", environment("/data/fingerprint")),
        ("seed", run.spec.get("seed").map(ToString::to_string)),
        ("updates", updates.map(grouped)),
        ("spec hash", text(&run.result, "/spec_hash")),
        ("commit", environment("/commit").map(|c| c + changes)),
        (
            "program",
            environment("/version").map(|v| format!("isqrt {v}")),
        ),
        ("processor", environment("/cpu")),
        (
            "cores",
            threads.map(|(cores, threads)| format!("{cores}, {threads} threads used")),
        ),
        ("device", environment("/device")),
        ("system", environment("/os")),
        ("started", started.filter(|s| *s < 1 << 40).map(date)),
    ];
    let facts = facts.into_iter();
    facts
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
}

fn diagnostics(run: &Run) -> Option<Group> {
    let mut stages: Vec<&String> = run
        .looks
        .iter()
        .flat_map(|l| l.gradient_norms.keys())
        .collect();
    stages.sort_unstable();
    stages.dedup();
    let of_stage = |stage: &&String| {
        let norm = |l: &super::folder::Look| l.gradient_norms.get(*stage).copied().flatten();
        let positive = |l: &super::folder::Look| norm(l).filter(|x| *x > 0.0);
        let at = run.looks.iter().map(|l| (l.step as f64, positive(l)));
        series(stage, at)
    };
    let norms = drawing(
        "Norm of the gradients by stage",
        "updates",
        "norm",
        true,
        stages.iter().map(of_stage).collect(),
    );
    let note = "Spectrum: eigenvalues of the covariance that enters the head, over its trace, in falling order, \
                mean of the images looked at; those below 1e-9 of the largest are rounding and left out.";
    let note = spectra(run).map_or_else(String::new, |_| note.to_owned());
    group("Diagnostics", note, vec![spectra(run), norms])
}

/// A few looks from the first to the last, evenly.
fn spectra(run: &Run) -> Option<Drawing> {
    let looks: Vec<_> = run
        .looks
        .iter()
        .filter(|l| !l.spectrum.is_empty())
        .collect();
    let last = looks.len().checked_sub(1)?;
    let mut chosen: Vec<usize> = (0..SPECTRA).map(|i| i * last / (SPECTRA - 1)).collect();
    chosen.dedup();
    let of_look = |i: usize| {
        let look = looks[i];
        let values = || look.spectrum.iter().copied().flatten();
        let least = NOISE * values().fold(0.0, f64::max);
        let points = values().enumerate().filter(|(_, y)| *y > least);
        let points = points.map(|(i, y)| ((i + 1) as f64, Some(y)));
        let points: Vec<Point> = points
            .filter_map(|(x, y)| {
                Some(Point {
                    x,
                    y: y?,
                    bar: None,
                })
            })
            .collect();
        Series {
            label: format!(
                "update {} (epoch {})",
                grouped(look.step as f64),
                look.epoch
            ),
            level: false,
            dots: points.len() < 3,
            points,
        }
    };
    let plot = LinePlot {
        title: "Spectrum of the covariance through training".to_owned(),
        x_label: "eigenvalue, in falling order".to_owned(),
        y_label: "share of the trace".to_owned(),
        log: true,
        log_x: true,
        series: chosen.into_iter().map(of_look).collect(),
    };
    Some(Drawing {
        title: plot.title.clone(),
        svg: plot.svg(),
    })
}

/// The worst classes, and the largest confusions.
fn classes(run: &Run) -> Option<(Table, Table)> {
    let confusion = run.confusion.as_ref().filter(|c| !c.classes.is_empty())?;
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let mut worst = Vec::new();
    let mut confusions = Vec::new();
    for (label, row) in confusion.counts.iter().enumerate() {
        let images = row.iter().fold(0_u64, |sum, n| sum.saturating_add(*n));
        if images > 0 {
            worst.push((share(row[label], images), label, row[label], images));
        }
        for (answer, &count) in row.iter().enumerate() {
            if answer != label && count > 0 {
                confusions.push((count, label, answer, images));
            }
        }
    }
    worst.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    confusions.sort_by_key(|&(count, label, answer, _)| (std::cmp::Reverse(count), label, answer));
    let name = |i: usize| label(&confusion.classes[i]);
    let count = |n: u64| plain(grouped(n as f64));
    let of_class = |&(accuracy, class, right, images): &(f64, usize, u64, u64)| {
        let accuracy = percent(Some(accuracy)).unwrap_or_default();
        vec![name(class), accuracy, count(right), count(images)]
    };
    let of_confusion = |&(n, class, answer, images): &(u64, usize, usize, u64)| {
        let share = percent(Some(share(n, images))).unwrap_or_default();
        vec![name(class), name(answer), count(n), share]
    };
    let worst = Table {
        head: vec![
            heading("class", ""),
            heading("accuracy", ""),
            heading("right", ""),
            heading("images", ""),
        ],
        rows: worst.iter().take(WORST).map(of_class).collect(),
    };
    let confusions = Table {
        head: vec![
            heading("class", ""),
            heading("taken for", ""),
            heading("images", ""),
            heading("of the class", ""),
        ],
        rows: confusions.iter().take(WORST).map(of_confusion).collect(),
    };
    Some((worst, confusions))
}

fn epochs(run: &Run) -> Option<Table> {
    let value = |x: Option<f64>, digits| x.map_or_else(missing, |x| plain(show(x, digits)));
    let row = |e: &EpochLine| {
        vec![
            plain(e.epoch.to_string()),
            value(e.train_loss, None),
            value(e.train_error, Some(2)),
            value(e.eval_loss, None),
            value(e.eval_error, Some(2)),
            value(e.eval_error5, Some(2)),
            value(e.images_per_second, None),
            e.seconds.map_or_else(missing, |s| plain(duration(s))),
        ]
    };
    (!run.epochs.is_empty()).then(|| Table {
        head: vec![
            heading("epoch", ""),
            heading("training loss", ""),
            heading("training error", "%"),
            heading("evaluation loss", ""),
            heading("top-1 error", "%"),
            heading("top-5 error", "%"),
            heading("images/s", ""),
            heading("took", ""),
        ],
        rows: run.epochs.iter().map(row).collect(),
    })
}
