//! Reading experiments: `extends`, unknown keys, and the checks that types cannot make.
//!
//! Every file is first checked alone, so that a mistake is reported with the file and line it is
//! in; then the parts are merged (tables key by key, everything else replaced) and read again.

use super::{
    Experiment, FigureKind, Measure, Recipe, Row, check_decomposition_size, check_size, embedded,
    metric_kind,
};
use crate::error::{Error, Result};
use candle_core::{DType, Device};
use isqrt_datasets::textures;
use isqrt_linalg::{Root, Schedule};
use isqrt_models::{BackboneSpec, RepresentationSpec, hint, in_words, nearest};
use isqrt_nn::Vars;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The TOML files that experiments are read from.
#[derive(Clone, Debug)]
pub struct Library {
    files: BTreeMap<String, String>,
}

impl Library {
    /// The files compiled into the program.
    pub fn embedded() -> Self {
        let files = embedded::FILES
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
            .collect();
        Self { files }
    }

    /// Every `.toml` file of a folder and of the folders directly below it.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or one of its files cannot be read.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        read_dir(dir, "", &mut files)?;
        Ok(Self { files })
    }

    /// A library of given files, path below `experiments/` and text.
    pub fn from_files<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let files = files
            .into_iter()
            .map(|(p, t)| (p.to_owned(), t.to_owned()))
            .collect();
        Self { files }
    }

    /// Writes all files below a folder, where `isqrt train` can read the recipes of the paper profile.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for (path, text) in &self.files {
            let path = dir.join(path);
            if let Some(folder) = path.parent() {
                crate::files::make_dir(folder)?;
            }
            crate::files::write_atomically(&path, text.as_bytes())?;
        }
        Ok(())
    }

    /// Ids of all experiments, in alphabetical order; parts in `_base/` are none.
    pub fn ids(&self) -> Vec<String> {
        self.files
            .keys()
            .filter(|path| !path.contains('/'))
            .filter_map(|path| path.strip_suffix(".toml"))
            .map(str::to_owned)
            .collect()
    }

    /// Reads one experiment.
    ///
    /// # Errors
    /// [`Error::UnknownExperiment`], [`Error::UnknownKey`] and [`Error::Spec`], each naming the
    /// file.
    pub fn load(&self, id: &str) -> Result<Experiment> {
        let path = format!("{id}.toml");
        if !self.files.contains_key(&path) || id.contains('/') {
            let ids = self.ids();
            return Err(Error::UnknownExperiment {
                id: id.to_owned(),
                nearest: nearest(id, ids.iter().map(String::as_str)),
                known: ids.join(", "),
            });
        }
        let merged = self.merged(&path, &mut Vec::new())?;
        let mut experiment: Experiment =
            merged
                .try_into()
                .map_err(|e: toml::de::Error| Error::Spec {
                    file: path.clone(),
                    line: None,
                    message: one_line(e.message()),
                })?;
        experiment.id = id.to_owned();
        check(&experiment, &path)?;
        Ok(experiment)
    }

    /// Reads several experiments, all of them if `ids` is empty, in the order of the report.
    ///
    /// # Errors
    /// As [`Library::load`].
    pub fn load_many(&self, ids: &[String]) -> Result<Vec<Experiment>> {
        let all = self.ids();
        let ids = if ids.is_empty() { &all } else { ids };
        if ids.is_empty() {
            return Err(Error::Spec {
                file: "the folder of experiments".to_owned(),
                line: None,
                message: "holds no experiment: a `.toml` file directly in it is one".to_owned(),
            });
        }
        let mut seen = BTreeSet::new();
        let loaded = ids.iter().filter(|id| seen.insert(id.as_str()));
        let mut experiments = loaded
            .map(|id| self.load(id))
            .collect::<Result<Vec<Experiment>>>()?;
        experiments.sort_by_key(|e| e.order);
        Ok(experiments)
    }

    fn merged(&self, path: &str, stack: &mut Vec<String>) -> Result<toml::Table> {
        let text = self
            .files
            .get(path)
            .ok_or_else(|| extends_error(stack, path, &self.files))?;
        if stack.iter().any(|p| p == path) {
            return Err(Error::Spec {
                file: path.to_owned(),
                line: None,
                message: format!("extends itself by way of {}", stack.join(" -> ")),
            });
        }
        // Checked alone, for the file and line of a mistake.
        let alone: Experiment = toml::from_str(text).map_err(|e| spec_error(path, text, &e))?;
        let own: toml::Table = toml::from_str(text).map_err(|e| spec_error(path, text, &e))?;
        stack.push(path.to_owned());
        let mut merged = toml::Table::new();
        for part in &alone.extends {
            merge(&mut merged, self.merged(part, stack)?);
        }
        stack.pop();
        merge(&mut merged, own);
        Ok(merged)
    }
}

fn read_dir(dir: &Path, prefix: &str, files: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io("read the folder", dir))? {
        let path = entry.map_err(Error::io("read the folder", dir))?.path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if path.is_dir() && prefix.is_empty() && name != "records" {
            read_dir(&path, &format!("{name}/"), files)?;
        } else if name.ends_with(".toml") {
            let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            files.insert(format!("{prefix}{name}"), text);
        }
    }
    Ok(())
}

/// Tables are merged key by key; any other value of `over` replaces the one below.
fn merge(under: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

fn extends_error(stack: &[String], path: &str, files: &BTreeMap<String, String>) -> Error {
    let hint = hint(nearest(path, files.keys().map(String::as_str)).as_deref());
    Error::Spec {
        file: stack.last().cloned().unwrap_or_default(),
        line: None,
        message: format!("extends `{path}`, which does not exist{hint}"),
    }
}

/// serde names an unknown field and the known ones in its message; this takes them apart.
fn spec_error(file: &str, text: &str, error: &toml::de::Error) -> Error {
    let line = error
        .span()
        .and_then(|span| text.get(..span.start))
        .map(|before| before.matches('\n').count() + 1);
    let message = error.message();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("unknown field")
        && let Some((key, known)) = quoted.split_first()
    {
        return Error::UnknownKey {
            file: file.to_owned(),
            line,
            key: (*key).to_owned(),
            nearest: nearest(key, known.iter().copied()),
        };
    }
    Error::Spec {
        file: file.to_owned(),
        line,
        message: in_words(&one_line(message)),
    }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What types cannot say: names that refer to other names, and numbers that make no sense.
fn check(e: &Experiment, file: &str) -> Result<()> {
    let fail = |message: String| {
        Err(Error::Spec {
            file: file.to_owned(),
            line: None,
            message,
        })
    };
    if e.title.is_empty() || e.rows.is_empty() || e.columns.is_empty() {
        return fail("an experiment needs a `title`, `rows` and `columns`".into());
    }
    let mut ids = BTreeSet::new();
    for (name, recipe) in &e.recipes {
        if let Err(message) = check_recipe(name, recipe) {
            return fail(format!("recipe `{name}`: {message}"));
        }
    }
    for name in &e.train_on {
        if let Err(message) = check_use(e, name) {
            return fail(message);
        }
    }
    for row in &e.rows {
        if !ids.insert(row.id.as_str()) {
            return fail(format!("two rows are called `{}`", row.id));
        }
        if let Err(message) = check_row(row)
            .and_then(|()| check_rates(e, row))
            .and_then(|()| check_sizes(e, row))
        {
            return fail(format!("row `{}`: {message}", row.id));
        }
    }
    let figures = e
        .figures
        .iter()
        .flat_map(|f| f.rows.iter().chain(&f.also).chain(&f.levels));
    let claims = e
        .claims
        .iter()
        .flat_map(|c| c.rows.iter().chain(Some(&c.than).filter(|t| !t.is_empty())));
    for id in figures.chain(claims) {
        if !ids.contains(id.as_str()) {
            let near = hint(nearest(id, ids.iter().copied()).as_deref());
            return fail(format!("there is no row `{id}`{near}"));
        }
    }
    if let Err(message) = check_metrics(e) {
        return fail(message);
    }
    let trains = e.trains();
    if trains && (e.train_on.is_empty() || e.seeds == 0) {
        return fail("rows are trained, so `train_on` and `seeds` of at least 1 are needed".into());
    }
    if trains {
        for (name, rates) in &e.rates {
            if rates.grid.is_empty() || rates.grid.iter().any(|lr| !is_rate(*lr)) {
                return fail(format!("`rates.{name}.grid` must hold positive numbers"));
            }
        }
    }
    for figure in &e.figures {
        if figure.kind == FigureKind::X
            && figure
                .rows
                .iter()
                .any(|r| e.row(r).is_none_or(|r| r.x.is_none()))
        {
            return fail(format!(
                "figure `{}`: every row on the curve needs an `x`",
                figure.title
            ));
        }
    }
    Ok(())
}

/// Whatever names a metric or a recipe names one that there is.
fn check_metrics(e: &Experiment) -> std::result::Result<(), String> {
    let measures: BTreeSet<Measure> =
        (e.rows.iter().flat_map(|r| r.measures.iter().copied())).collect();
    let known: Vec<&str> = measures
        .iter()
        .flat_map(|m| m.metrics().iter().copied())
        .collect();
    let columns = e.columns.iter().map(|c| ("columns", &c.metric, &c.on));
    let claims = e.claims.iter().map(|c| ("claims", &c.metric, &c.on));
    let figures = (e.figures.iter()).flat_map(|f| {
        f.metrics
            .iter()
            .map(move |metric| ("figures", metric, &f.on))
    });
    let paper = (e.rows.iter().flat_map(|r| &r.paper)).map(|p| ("paper", &p.metric, &p.on));
    for (place, metric, on) in columns.chain(claims).chain(figures).chain(paper) {
        // Whether a metric with a size was measured at that size only the numbers tell.
        let (kind, of) = metric_kind(metric);
        if !known.contains(&kind) {
            let near = hint(nearest(kind, known.iter().copied()).as_deref());
            return Err(format!("`{place}`: no row is measured by `{metric}`{near}"));
        }
        if matches!(kind, "epochs_to:" | "seconds_to:") && e.row(of).is_none() {
            let ids = e.rows.iter().map(|r| r.id.as_str());
            let near = hint(nearest(of, ids).as_deref());
            return Err(format!(
                "`{place}`: `{metric}`: there is no row `{of}`{near}"
            ));
        }
        if !on.is_empty() && !e.train_on.contains(on) {
            let near = hint(nearest(on, e.train_on.iter().map(String::as_str)).as_deref());
            return Err(format!(
                "`{place}`: `on = \"{on}\"` is not in `train_on`{near}"
            ));
        }
    }
    Ok(())
}

/// Whether SGD can train with it.
fn is_rate(lr: f64) -> bool {
    lr > 0.0 && lr.is_finite()
}

/// A recipe alone.
fn check_recipe(name: &str, recipe: &Recipe) -> std::result::Result<(), String> {
    let counts = [recipe.batch, recipe.epochs, recipe.eval_every];
    if recipe.backbone.name.is_empty() || counts.contains(&0) {
        return Err(
            "it needs `backbone`, and `batch`, `epochs` and `eval_every` of at least 1".into(),
        );
    }
    if recipe.data.is_empty() == recipe.up_to_side.is_none() {
        return Err(
            "it needs either `data`, one of the program's own sets, or `up_to_side`".into(),
        );
    }
    if !recipe.data.is_empty() {
        textures::Set::named(&recipe.data).map_err(|e| e.to_string())?;
    }
    if recipe.start.as_deref() == Some(name) {
        return Err("`start` names itself".into());
    }
    recipe.pipelines()?;
    check_backbone(&recipe.backbone)
}

fn check_backbone(backbone: &BackboneSpec) -> std::result::Result<(), String> {
    let mut vars = Vars::new(0, DType::F32, &Device::Cpu);
    let BackboneSpec { options, .. } = backbone;
    backbone
        .entry()
        .and_then(|entry| match options.is_empty() {
            true => Ok(()),
            // Only building tells whether the options are right.
            false => entry.build(options, vars.root()).map(drop),
        })
        .map_err(|e| e.to_string())
}

/// A recipe that rows go through: there, on a data set, and after one that is there as well.
fn check_use(e: &Experiment, name: &str) -> std::result::Result<(), String> {
    let find = |name: &str| {
        let near = || hint(nearest(name, e.recipes.keys().map(String::as_str)).as_deref());
        e.recipes
            .get(name)
            .ok_or_else(|| format!("there is no recipe `{name}`{}", near()))
    };
    let recipe = find(name)?;
    if recipe.data.is_empty() {
        return Err(format!("`train_on`: recipe `{name}` names no `data`"));
    }
    if let Some(start) = &recipe.start
        && find(start)?.start.is_some()
    {
        return Err(format!(
            "recipe `{name}` starts from `{start}`, which itself starts from another"
        ));
    }
    Ok(())
}

/// Every row that is trained has a rate for every recipe that it may go through.
fn check_rates(e: &Experiment, row: &Row) -> std::result::Result<(), String> {
    if !row.measures.contains(&Measure::Train) {
        return Ok(());
    }
    let mut names: BTreeSet<&str> = e.train_on.iter().map(String::as_str).collect();
    if e.from_scratch() {
        names.extend(
            (e.recipes.iter())
                .filter(|(_, r)| r.up_to_side.is_some())
                .map(|(name, _)| name.as_str()),
        );
    }
    for name in names {
        let rates = e.rates.get(name);
        match rates.and_then(|r| r.heads.get(&row.id)) {
            Some(head) if is_rate(head.lr) => {}
            Some(head) => {
                return Err(format!(
                    "`lr = {}` in `rates.{name}.heads` must be a positive number",
                    head.lr
                ));
            }
            None if rates.is_some_and(|r| is_rate(r.fallback)) => {}
            None => {
                return Err(format!(
                    "it has no rate in `rates.{name}.heads`, so `rates.{name}.fallback` must be a \
                     positive number"
                ));
            }
        }
    }
    Ok(())
}

/// What is timed or measured for a row has a size, and one that fits into memory.
fn check_sizes(e: &Experiment, row: &Row) -> std::result::Result<(), String> {
    for measure in &row.measures {
        match measure {
            Measure::LayerTime | Measure::RootError | Measure::Precision | Measure::Abilities => {
                check_size(e.layer.batch, e.layer.dim, e.layer.positions)
                    .map_err(|m| format!("`[layer]`: {m}"))?;
            }
            Measure::DecompositionTime => {
                check_decomposition_size(e.decomposition.batch, e.decomposition.dim)
                    .map_err(|m| format!("`[decomposition]`: {m}"))?;
            }
            Measure::NetworkTime | Measure::Throughput => {
                let n = &e.network;
                let batches = n.batches.iter().copied().chain([n.batch]);
                check_backbone(&n.backbone).map_err(|m| format!("`[network]`: {m}"))?;
                for batch in batches {
                    check_size(batch, 3 * n.side, n.side)
                        .map_err(|m| format!("`[network]`: {m}"))?;
                }
                if n.classes == 0 || (*measure == Measure::Throughput && n.batches.is_empty()) {
                    return Err(
                        "`[network]` needs `classes`, and `batches` for a throughput".into(),
                    );
                }
            }
            Measure::Scaling => {
                for [batch, dim, positions, _] in e.scaling.sizes() {
                    check_size(batch, dim, positions).map_err(|m| format!("`[scaling]`: {m}"))?;
                }
                let head = row.head.as_ref().map(root).transpose()?.flatten();
                for n in &e.scaling.iterations {
                    let root = Root {
                        schedule: Schedule::NewtonSchulz { iterations: *n },
                        ..head.clone().unwrap_or_default()
                    };
                    root.check_f32().map_err(|m| format!("`[scaling]`: {m}"))?;
                }
            }
            Measure::Train => {}
        }
    }
    Ok(())
}

fn check_row(row: &Row) -> std::result::Result<(), String> {
    if row.measures.is_empty() {
        return match row.not_run {
            Some(_) => Ok(()),
            None => Err("nothing is measured, so `not_run` must say why".into()),
        };
    }
    let head = row.head.as_ref().ok_or("`measures` need a `head`")?;
    if let Some(backbone) = &row.backbone {
        check_backbone(backbone)?;
    }
    if let Some(head) = &row.start_head {
        check_head(head)?;
    }
    if matches!(head.name.as_str(), "eig" | "svd") {
        if row.measures == [Measure::DecompositionTime] {
            return Ok(());
        }
        return Err("a bare decomposition can only be timed (`decomposition-time`)".into());
    }
    check_head(head)?;
    let schedule = schedule(head)?;
    for measure in &row.measures {
        match measure {
            Measure::LayerTime | Measure::Scaling | Measure::Precision | Measure::Abilities
                if matches!(head.name.as_str(), "gap" | "flat") =>
            {
                return Err(format!(
                    "`{}` needs a layer of second order, not `{}`",
                    measure.name(),
                    head.name
                ));
            }
            Measure::DecompositionTime
                if schedule != Some(Schedule::NewtonSchulz { iterations: 5 }) =>
            {
                return Err(
                    "`decomposition-time` needs head `eig`, `svd`, or `isqrt` with 5 iterations"
                        .into(),
                );
            }
            Measure::RootError
                if !(head.name == "mpn" && head.options.is_empty() || is_usual_root(head)?) =>
            {
                return Err(
                    "`root-error` needs `mpn`, or `isqrt` with trace normalisation and \
                     post-compensation, which it is measured with"
                        .into(),
                );
            }
            Measure::Scaling if !matches!(schedule, Some(Schedule::NewtonSchulz { .. })) => {
                return Err(
                    "`scaling` needs a head `isqrt` with `iterations`, which are one of its sizes"
                        .into(),
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a head is a root with the usual normalisation and compensation.
fn is_usual_root(head: &RepresentationSpec) -> std::result::Result<bool, String> {
    let usual = Root::default();
    Ok(root(head)?.is_some_and(|r| {
        r.pre_normalization == usual.pre_normalization
            && r.post_compensation == usual.post_compensation
    }))
}

/// Building tells whether name and options are right.
fn check_head(head: &RepresentationSpec) -> std::result::Result<(), String> {
    let mut vars = Vars::new(0, DType::F32, &Device::Cpu);
    head.entry()
        .and_then(|entry| entry.build(&head.options, 8, vars.root()))
        .map(drop)
        .map_err(|e| e.to_string())
}

/// The steps of an `isqrt` head; none of another head.
///
/// # Errors
/// A sentence where options do not fit.
pub(crate) fn schedule(head: &RepresentationSpec) -> std::result::Result<Option<Schedule>, String> {
    root(head).map(|root| root.map(|root| root.schedule))
}

/// The root of an `isqrt` head; none of another head.
fn root(head: &RepresentationSpec) -> std::result::Result<Option<Root>, String> {
    match head.name.as_str() {
        "isqrt" => isqrt_models::representations::isqrt::layer(&head.options)
            .map(|pool| pool.root)
            .map_err(|e| e.to_string()),
        _ => Ok(None),
    }
}
