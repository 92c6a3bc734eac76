//! What the report says, before it has a form: tables as text cells, figures as drawings, claims
//! as sentences.

use super::plot::{BarPlot, LinePlot, Point, Series};
use super::tables;
use crate::claims::{self, Verdict};
use crate::machine::{Machine, date};
use crate::plan::{Effort, Plan, Planned, State};
use crate::record::{DataInfo, Record, Store};
use crate::results::{Results, Sample};
use crate::spec::{Column, Experiment, Figure, FigureKind, Row, metric_kind};
use crate::stats::{duration, mean, sd, show};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub struct Page {
    /// Cells with a record, of those that are to be run.
    pub done: usize,
    /// Cells that are to be run.
    pub cells: usize,
    /// When the latest record was made.
    pub date: String,
    /// Whether some experiment ran only at the smallest size.
    pub smoke: bool,
    /// Whether some paper value is unverified.
    pub unverified: bool,
    /// How claims are decided.
    pub criterion: &'static str,
    /// What the records say about their origin, one line each.
    pub origin: Vec<(String, String)>,
    /// Lines of the record file that could not be read.
    pub warnings: Vec<String>,
    /// The experiments.
    pub sections: Vec<Section>,
}

/// One experiment.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// Experiment id.
    pub id: String,
    /// Heading.
    pub title: String,
    /// Which table or figure of the paper.
    pub paper_item: String,
    /// What is measured.
    pub about: String,
    /// What to know before comparing.
    pub caveat: String,
    /// Profile, data, seeds, device, commit, time.
    pub facts: Vec<(String, String)>,
    /// The table.
    pub table: Table,
    /// The table with a line a number, as comma-separated values.
    pub csv: String,
    /// The table for LaTeX, with booktabs.
    pub latex: String,
    /// Whether the paper's order of the rows was found, a sentence a column.
    pub orderings: Vec<String>,
    /// Claims and how they came out.
    pub verdicts: Vec<Verdict>,
    /// Drawings.
    pub figures: Vec<Drawing>,
    /// The learning-rate grids, one a recipe.
    pub rates: Vec<RatesTable>,
    /// What was not run, and why.
    pub not_run: Vec<String>,
    /// Every number with its seed.
    pub numbers: Vec<Vec<String>>,
    /// Command that runs this experiment again.
    pub command: String,
}

/// A table of text cells.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    /// Headings, the first for the row labels.
    pub head: Vec<Heading>,
    /// Rows of cells.
    pub rows: Vec<Vec<Entry>>,
}

/// Heading of a column.
#[derive(Clone, Debug, Serialize)]
pub struct Heading {
    /// What is shown.
    pub label: String,
    /// Its unit.
    pub unit: String,
    /// `paper`, `ours` or empty.
    pub who: String,
}

/// One cell of the table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Entry {
    /// What is shown.
    pub text: String,
    /// Smaller print after it: the spread, the number of runs.
    pub note: String,
    /// Ours less the paper's number, where both are there.
    pub difference: String,
    /// `paper`, `ours`, `missing`, `label` or empty.
    pub class: String,
    /// A paper value that was not checked against its source.
    pub unverified: bool,
    /// The source of a paper value.
    pub source: String,
}

/// A drawing with its heading.
#[derive(Clone, Debug, Serialize)]
pub struct Drawing {
    /// Heading.
    pub title: String,
    /// An `<svg>` element, escaped already.
    pub svg: String,
}

/// Validation errors of the learning-rate search.
#[derive(Clone, Debug, Serialize)]
pub struct RatesTable {
    /// Recipe.
    pub recipe: String,
    /// How they were found.
    pub note: String,
    /// Rates of the grid.
    pub grid: Vec<String>,
    /// One row a head.
    pub rows: Vec<RateRow>,
}

/// The search of one head.
#[derive(Clone, Debug, Serialize)]
pub struct RateRow {
    /// Row label.
    pub label: String,
    /// The chosen rate.
    pub lr: String,
    /// For each rate of the grid its error and whether it was chosen.
    pub errors: Vec<(String, bool)>,
}

impl Page {
    /// Collects everything from a plan and its records.
    pub fn new(plan: &Plan, store: &Store) -> Self {
        let mut sections = Vec::new();
        let (mut done, mut cells, mut latest) = (0, 0, 0);
        let mut machines = BTreeMap::new();
        for planned in &plan.experiments {
            let wanted = || {
                planned
                    .cells
                    .iter()
                    .filter(|c| !matches!(c.state, State::NotRun(_)))
            };
            cells += wanted().count();
            done += wanted()
                .filter(|c| !c.key.is_empty() && store.latest(&c.key).is_some())
                .count();
            let results = Results::new(planned, store);
            for record in results.all() {
                latest = latest.max(record.finished);
                machines.insert(machine_text(&record.machine), ());
            }
            sections.push(Section::new(planned, store, &results));
        }
        let commits: BTreeSet<&str> = store.records().iter().map(|r| r.commit.as_str()).collect();
        let origin = vec![
            ("machine".to_owned(), joined(machines.keys().cloned())),
            (
                "commit".to_owned(),
                joined(commits.iter().map(|c| (*c).to_owned())),
            ),
            (
                "program".to_owned(),
                format!("isqrt {}", env!("CARGO_PKG_VERSION")),
            ),
        ];
        Self {
            done,
            cells,
            date: if latest == 0 {
                "nothing run yet".to_owned()
            } else {
                date(latest)
            },
            smoke: plan.experiments.iter().any(|p| p.smoke),
            unverified: sections
                .iter()
                .any(|s| s.table.rows.iter().flatten().any(|e| e.unverified)),
            criterion: claims::CRITERION,
            origin,
            warnings: store.warnings().to_vec(),
            sections,
        }
    }
}

fn joined(parts: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = parts.collect();
    if all.is_empty() {
        "none yet".to_owned()
    } else {
        all.join("; ")
    }
}

fn machine_text(m: &Machine) -> String {
    format!(
        "{}, {} cores, {} threads used, {}",
        m.cpu, m.cores, m.threads, m.os
    )
}

fn data_text(d: &DataInfo) -> String {
    format!(
        "{}: {} classes, {} train, {} validation, {} test images of {} pixels ({}); fingerprint {}",
        d.name,
        d.classes,
        d.train,
        d.val,
        d.test,
        d.side,
        d.note,
        d.fingerprint.get(..12).unwrap_or(&d.fingerprint)
    )
}

/// In place of what a result has to say.
const SMALLEST: &str =
    "Run at the smallest size, only to see that it runs: these numbers decide no claim.";

impl Section {
    fn new(planned: &Planned, store: &Store, results: &Results<'_>) -> Self {
        let e = &planned.experiment;
        let table = table(planned, results);
        // At the smallest size nothing is decided and no rate was used that is of any interest.
        let is_result = !planned.smoke;
        Self {
            id: e.id.clone(),
            title: e.title.clone(),
            paper_item: e.paper_item.clone(),
            about: e.about.clone(),
            caveat: match is_of_own_images(planned) && !e.own_caveat.is_empty() {
                _ if !is_result => SMALLEST.to_owned(),
                true => format!("{} {}", e.caveat, e.own_caveat),
                false => e.caveat.clone(),
            },
            facts: facts(planned, results),
            csv: tables::csv(planned, results),
            latex: tables::latex(e, &table),
            table,
            orderings: (e.columns.iter())
                .filter(|_| is_result)
                .filter_map(|column| claims::ordering(e, column, results))
                .collect(),
            verdicts: match is_result {
                true => claims::decide(e, results),
                false => Vec::new(),
            },
            figures: e
                .figures
                .iter()
                .map(|f| Drawing {
                    title: f.title.clone(),
                    svg: draw(e, f, results),
                })
                .collect(),
            rates: match is_result {
                true => rates(planned, store),
                false => Vec::new(),
            },
            not_run: not_run(planned, results),
            numbers: numbers(planned, results),
            command: planned.command.clone(),
        }
    }
}

/// Whether networks are trained on the program's own images: not on the user's, nor by the paper's recipes.
fn is_of_own_images(planned: &Planned) -> bool {
    let recipes = &planned.experiment.recipes;
    let mut names = planned.data.keys();
    names.any(|name| recipes.get(name).is_some_and(|r| !r.data.is_empty()))
}

fn facts(planned: &Planned, results: &Results<'_>) -> Vec<(String, String)> {
    let effort = match planned.effort {
        Effort::Usual => "",
        Effort::Quick => ", quick: a sixth of the epochs, three seeds at most",
        Effort::Thorough => ", thorough: twice the epochs, two seeds more",
    };
    let smoke = match planned.smoke {
        true => ", smallest size: a test of the program, not a result",
        false => "",
    };
    let profile = format!("{}{effort}{smoke}", planned.profile.name());
    let mut facts = vec![("profile".to_owned(), profile)];
    for (name, data) in &planned.data {
        facts.push((format!("data of {name}"), data_text(data)));
        if let Some(r) = planned.experiment.recipes.get(name) {
            let mut r = r.clone();
            r.fit(data.train);
            let start = match &r.start {
                Some(start) => format!("; starts from a network trained as {start}"),
                None => String::new(),
            };
            facts.push((
                format!("training on {name}"),
                format!(
                    "{} where the row names no other, {}, batch {}, SGD momentum {}, weight decay \
                     {}, cosine schedule; images {} in training, {} in evaluation{start}",
                    r.backbone,
                    isqrt_train::counted(r.epochs, "epoch"),
                    r.batch,
                    r.momentum,
                    r.weight_decay,
                    r.train_transforms,
                    r.eval_transforms
                ),
            ));
        }
    }
    let seeds: BTreeSet<u64> = results.all().filter_map(|r| r.seed).collect();
    if !seeds.is_empty() {
        let list: Vec<String> = seeds.iter().map(u64::to_string).collect();
        facts.push(("seeds".to_owned(), list.join(", ")));
    }
    let devices: BTreeSet<String> = results
        .all()
        .map(|r| format!("{} ({})", r.machine.device, machine_text(&r.machine)))
        .collect();
    facts.push(("device".to_owned(), joined(devices.into_iter())));
    let commits: BTreeSet<String> = results.all().map(|r| r.commit.clone()).collect();
    facts.push(("commit".to_owned(), joined(commits.into_iter())));
    let spent: f64 = results.all().map(|r| r.seconds).sum();
    facts.push(("time spent".to_owned(), duration(spent)));
    facts
}

/// Columns of the table: for each metric the paper's values and ours, then the paper's in other settings.
fn table(planned: &Planned, results: &Results<'_>) -> Table {
    let e = &planned.experiment;
    let mut table = Table::default();
    let heading = |label: &str, unit: &str, who: &str| Heading {
        label: label.to_owned(),
        unit: unit.to_owned(),
        who: who.to_owned(),
    };
    table.head.push(heading("", "", ""));
    let mut plan: Vec<(&Column, Option<String>)> = Vec::new();
    for column in &e.columns {
        let mut settings: Vec<&str> = Vec::new();
        for value in e.rows.iter().flat_map(|r| &r.paper) {
            let here = value.metric == column.metric && value.on == column.on;
            if here && !settings.contains(&value.setting.as_str()) {
                settings.push(&value.setting);
            }
        }
        settings.sort_by_key(|s| !s.is_empty());
        let at = usize::from(settings.first().is_some_and(|s| s.is_empty()));
        let mut columns: Vec<Option<&str>> = settings.into_iter().map(Some).collect();
        columns.insert(at, None);
        for setting in columns {
            let who = match setting {
                None => "ours".to_owned(),
                Some("") => "paper".to_owned(),
                Some(s) => format!("paper, {s}"),
            };
            table.head.push(heading(&column.label, &column.unit, &who));
            plan.push((column, setting.map(str::to_owned)));
        }
    }
    for row in &e.rows {
        let mut cells = vec![Entry {
            text: row.label.clone(),
            class: "label".to_owned(),
            ..Entry::default()
        }];
        for (column, setting) in &plan {
            cells.push(match setting {
                Some(setting) => paper_entry(row, column, setting),
                None => our_entry(planned, row, column, results),
            });
        }
        table.rows.push(cells);
    }
    table
}

/// Whether the numbers have to do with the paper's: errors on images of the user's have not, nor has the
/// smallest size.
pub(super) fn compares(planned: &Planned, sample: &Sample) -> bool {
    let users = sample.is_seeded() && !planned.data.is_empty() && !is_of_own_images(planned);
    !users && !planned.smoke
}

fn paper_entry(row: &Row, column: &Column, setting: &str) -> Entry {
    let found = row
        .paper
        .iter()
        .find(|p| p.metric == column.metric && p.on == column.on && p.setting == setting);
    found.map_or_else(Entry::default, |p| Entry {
        text: format!("{}", p.value),
        class: "paper".to_owned(),
        unverified: !p.verified,
        source: p.source.clone(),
        ..Entry::default()
    })
}

fn our_entry(planned: &Planned, row: &Row, column: &Column, results: &Results<'_>) -> Entry {
    if let Some(sample) = results.sample(&row.id, &column.metric, &column.on) {
        // Runs that diverged, or never got there, are told of beside the mean of the others.
        let finite = sample.finite();
        let text = match sample.words() {
            Some(words) => words.to_owned(),
            None if column.metric.contains("_to:") && finite.is_empty() => "never".to_owned(),
            None if finite.is_empty() => show(f64::NAN, None),
            None => show(mean(&finite), column.digits),
        };
        let paper = row.paper_value(&column.metric, &column.on);
        let difference = paper
            .filter(|_| compares(planned, &sample))
            .map(|p| sample.mean() - p.value)
            .filter(|d| d.is_finite())
            .map_or_else(String::new, |d| {
                let sign = if d < 0.0 { "\u{2212}" } else { "+" };
                format!("{sign}{}", show(d.abs(), column.digits))
            });
        return Entry {
            text,
            note: spread(&sample, column.digits),
            difference,
            class: "ours".to_owned(),
            ..Entry::default()
        };
    }
    // Empty where this metric is not meant to be measured for this row.
    let kind = metric_kind(&column.metric).0;
    let concerns = (row.measures.iter()).any(|m| m.metrics().contains(&kind));
    let refused = planned
        .cells
        .iter()
        .any(|c| c.row == row.id && matches!(c.state, State::NotRun(_)));
    let text = match (row.not_run.is_some(), concerns) {
        (true, _) => "not run",
        (_, true) if refused => "not run",
        (_, true) => "not yet run",
        _ => return Entry::default(),
    };
    Entry {
        text: text.to_owned(),
        class: "missing".to_owned(),
        ..Entry::default()
    }
}

fn spread(sample: &Sample, digits: Option<usize>) -> String {
    match sample.values.as_slice() {
        _ if sample.words().is_some() => String::new(),
        [((_, None), one)] => match (one.low, one.high) {
            (Some(low), Some(high)) => format!("{}–{}", show(low, digits), show(high, digits)),
            _ => String::new(),
        },
        [_] => "1 run".to_owned(),
        many => {
            let finite = sample.finite();
            let runs = match (finite.len(), many.len()) {
                (n, all) if n == all => format!("{all} runs"),
                (n, all) => format!("{n} of {all} runs, the others not"),
            };
            match finite.is_empty() {
                true => format!("({} runs)", many.len()),
                false => format!("± {} ({runs})", show(sd(&finite), digits)),
            }
        }
    }
}

fn not_run(planned: &Planned, results: &Results<'_>) -> Vec<String> {
    let mut lines = Vec::new();
    for row in &planned.experiment.rows {
        if let Some(why) = &row.not_run {
            lines.push(format!("{}: {why}", row.label));
        }
    }
    let mut missing: BTreeMap<String, usize> = BTreeMap::new();
    for cell in planned.cells.iter().filter(|c| c.is_shown()) {
        match &cell.state {
            State::NotRun(why) => {
                let line = format!("{}: {why}", cell.label);
                if !lines.contains(&line) {
                    lines.push(line);
                }
            }
            _ => {
                let there = results
                    .of_row(&cell.row)
                    .any(|r| r.key == cell.key && r.measure == cell.measure.name());
                if !there {
                    *missing
                        .entry(format!("{} ({})", cell.label, cell.measure.name()))
                        .or_default() += 1;
                }
            }
        }
    }
    for (what, count) in missing {
        lines.push(format!(
            "{what}: not yet run, {}; the command below goes on",
            isqrt_train::counted(count, "cell")
        ));
    }
    lines
}

/// Every number: cell, seed, metric, value, unit, time, commit, and the command that measures it again.
fn numbers(planned: &Planned, results: &Results<'_>) -> Vec<Vec<String>> {
    let line = |r: &Record, m: &crate::record::Measurement| {
        vec![
            r.cell.clone(),
            r.seed.map_or_else(|| "–".to_owned(), |s| s.to_string()),
            m.metric.clone(),
            match m.words.as_str() {
                "" => show(m.value, None),
                words => words.to_owned(),
            },
            m.unit.clone(),
            duration(r.seconds),
            date(r.finished),
            r.commit.clone(),
            format!("{} --row {}", planned.command, r.row),
        ]
    };
    results
        .all()
        .flat_map(|r| r.measurements().map(move |m| line(r, m)))
        .collect()
}

fn rates(planned: &Planned, store: &Store) -> Vec<RatesTable> {
    let names = planned.data.keys();
    names
        .filter_map(|on| rates_of(planned, on, store))
        .collect()
}

fn rates_of(planned: &Planned, on: &str, store: &Store) -> Option<RatesTable> {
    let e = &planned.experiment;
    let recorded = e.rates.get(on)?;
    let is_here = |row: &&Row| planned.cells.iter().any(|c| c.row == row.id && c.on == on);
    let mut rows = Vec::new();
    for row in e.rows.iter().filter(is_here) {
        let (lr, outcome) = if planned.search {
            planned
                .search_outcome(&row.id, on, store)
                .map_or((None, Vec::new()), |(lr, grid)| (Some(lr), grid))
        } else {
            match recorded.heads.get(&row.id) {
                Some(head) => (Some(head.lr), head.outcome.clone()),
                None => (Some(recorded.fallback), Vec::new()),
            }
        };
        let cells = recorded
            .grid
            .iter()
            .map(|rate| {
                let error = outcome.iter().find(|o| o[0] == *rate).map(|o| o[1]);
                let text = error.map_or_else(|| "–".to_owned(), |e| show(e, Some(1)));
                (text, lr == Some(*rate))
            })
            .collect();
        let lr = lr.map_or_else(|| "not yet found".to_owned(), |lr| lr.to_string());
        rows.push(RateRow {
            label: row.label.clone(),
            lr,
            errors: cells,
        });
    }
    let note = if planned.search {
        "searched in this run, on the validation part, with one seed that is not among those reported".to_owned()
    } else {
        format!(
            "recorded before, not searched in this run: {}",
            recorded.note
        )
    };
    Some(RatesTable {
        recipe: on.to_owned(),
        note,
        grid: recorded.grid.iter().map(f64::to_string).collect(),
        rows,
    })
    .filter(|table| !table.rows.is_empty())
}

fn draw(e: &Experiment, figure: &Figure, results: &Results<'_>) -> String {
    match figure.kind {
        FigureKind::X => draw_x(e, figure, results),
        FigureKind::Epochs => draw_epochs(e, figure, results),
        FigureKind::Bars => draw_bars(e, figure, results),
        FigureKind::Sweep => draw_sweep(e, figure, results),
    }
    .unwrap_or_else(|| "<p class=\"missing\">nothing measured yet</p>".to_owned())
}

fn point(x: f64, sample: &Sample) -> Point {
    Point {
        x,
        y: sample.mean(),
        bar: sample.interval(),
    }
}

fn label_of(e: &Experiment, row: &str) -> String {
    e.row(row)
        .map_or_else(|| row.to_owned(), |r| r.label.clone())
}

fn draw_x(e: &Experiment, figure: &Figure, results: &Results<'_>) -> Option<String> {
    let metric = figure.metrics.first()?;
    let curve = |rows: &[String], label: &str| {
        let points: Vec<Point> = rows
            .iter()
            .filter_map(|r| Some(point(e.row(r)?.x?, &results.sample(r, metric, &figure.on)?)))
            .collect();
        (!points.is_empty()).then(|| Series {
            label: label.to_owned(),
            points,
            level: false,
            dots: true,
        })
    };
    let mut series: Vec<Series> = curve(&figure.rows, &figure.label).into_iter().collect();
    series.extend(curve(&figure.also, &figure.also_label));
    for row in &figure.levels {
        if let Some(sample) = results.sample(row, metric, &figure.on) {
            series.push(Series {
                label: label_of(e, row),
                points: vec![point(0.0, &sample)],
                level: true,
                dots: false,
            });
        }
    }
    plot(figure, series)
}

fn plot(figure: &Figure, series: Vec<Series>) -> Option<String> {
    if series.is_empty() {
        return None;
    }
    let plot = LinePlot {
        title: figure.title.clone(),
        x_label: figure.x_label.clone(),
        y_label: match figure.log {
            true => format!("{} (log scale)", figure.y_label),
            false => figure.y_label.clone(),
        },
        log: figure.log,
        log_x: figure.log_x,
        series,
    };
    Some(plot.svg())
}

fn draw_epochs(e: &Experiment, figure: &Figure, results: &Results<'_>) -> Option<String> {
    let mut series = Vec::new();
    for row in &figure.rows {
        let curves = results.curves(row, &figure.on);
        let length = curves.iter().map(|(_, c)| c.len()).min().unwrap_or(0);
        let points: Vec<Point> = (0..length)
            .map(|i| {
                let at: Vec<f64> = curves.iter().map(|(_, c)| c[i]).collect();
                Point {
                    x: (i + 1) as f64,
                    y: mean(&at),
                    bar: None,
                }
            })
            .collect();
        if !points.is_empty() {
            series.push(Series {
                label: label_of(e, row),
                points,
                level: false,
                dots: length < 3,
            });
        }
    }
    plot(figure, series)
}

fn draw_sweep(e: &Experiment, figure: &Figure, results: &Results<'_>) -> Option<String> {
    let series = figure.rows.iter().filter_map(|row| {
        let places = figure.places.iter().zip(&figure.metrics);
        let points: Vec<Point> = places
            .filter_map(|(x, metric)| Some(point(*x, &results.sample(row, metric, &figure.on)?)))
            .collect();
        (!points.is_empty()).then(|| Series {
            label: label_of(e, row),
            points,
            level: false,
            dots: true,
        })
    });
    plot(figure, series.collect())
}

fn draw_bars(e: &Experiment, figure: &Figure, results: &Results<'_>) -> Option<String> {
    let groups: Vec<(String, Vec<Option<Point>>)> = figure
        .rows
        .iter()
        .map(|row| {
            let bars = figure
                .metrics
                .iter()
                .map(|m| results.sample(row, m, &figure.on).map(|s| point(0.0, &s)))
                .collect();
            (label_of(e, row), bars)
        })
        .collect();
    if groups
        .iter()
        .all(|(_, bars)| bars.iter().all(Option::is_none))
    {
        return None;
    }
    let series = figure
        .metrics
        .iter()
        .map(|m| e.column(m).map_or_else(|| m.clone(), |c| c.label.clone()))
        .collect();
    let plot = BarPlot {
        title: figure.title.clone(),
        x_label: figure.x_label.clone(),
        series,
        groups,
    };
    Some(plot.svg())
}
