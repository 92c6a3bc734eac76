//! `isqrt reproduce`: plan, run, record, report.

use super::data::list_options;
use super::device::DeviceArg;
use crate::output;
use crate::progress::{Display, say};
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use isqrt_datasets::Broken;
use isqrt_experiments::machine::Machine;
use isqrt_experiments::plan::{Effort, Infos, Plan, Profile, Request, State, needs_data};
use isqrt_experiments::record::Store;
use isqrt_experiments::run::{self, RealLab, Source};
use isqrt_experiments::spec::{Experiment, Library};
use isqrt_experiments::stats::duration;
use std::path::{Path, PathBuf};

/// Run the paper's tables and figures and write a report
///
/// Shows the plan, runs the cells that are not done yet, records each, and writes
/// report/index.html and report/report.md into the output folder. Stopping and starting again
/// loses at most the running cells.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt reproduce                                  all tables and figures, small, in minutes
  isqrt reproduce --quick                          a look at all of them
  isqrt reproduce iterations --data my/images      one experiment on your own images
  isqrt reproduce fine-grained --row vgg-isqrt     one row of a table
  isqrt reproduce --dry-run                        only the plan
  isqrt reproduce --profile paper --data /data --dry-run   what the paper's own protocol would take")]
pub struct Reproduce {
    /// Experiments to run [default: all]
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Small networks in minutes, or the paper's protocol
    #[arg(long, value_enum, default_value_t = ProfileArg::Mini)]
    profile: ProfileArg,
    /// Images to train on: a folder, archive or list in any layout of data/README.md [default: small sets
    /// that the program makes]; with --profile paper the folder that holds imagenet, cub, aircraft, cars
    /// and weights
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Only these rows of the tables
    #[arg(long = "row", value_name = "ROW")]
    rows: Vec<String>,
    /// A sixth of the epochs, three seeds and fewest repeats: a look at everything
    #[arg(long, conflicts_with = "thorough")]
    quick: bool,
    /// Twice the epochs and repeats, two seeds more
    #[arg(long)]
    thorough: bool,
    /// Labels to read, where a set has several (FGVC-Aircraft: variant, family, manufacturer)
    #[arg(long, value_name = "NAME", requires = "data")]
    labels: Option<String>,
    /// Folder for the indices of archives [default: beside the archive]
    #[arg(long, value_name = "DIR", requires = "data")]
    cache: Option<PathBuf>,
    /// Leave out images that are missing or cannot be read, up to this many percent of each part, and list
    /// them in the records [default: the first one is an error]
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    skip_broken: Option<f64>,
    #[command(flatten)]
    device: DeviceArg,
    /// Output folder [default: out/reproduce or out/smoke, with the names of --data and of the length added;
    /// out/paper or out/smoke-paper]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seeds of each training [default: as the experiment says]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// Search the learning rates on the validation part instead of using the recorded ones
    #[arg(long)]
    search: bool,
    /// Show the plan and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Run cells again that are done
    #[arg(long)]
    fresh: bool,
    /// Everything at the smallest size, only to see that it runs
    #[arg(long)]
    smoke: bool,
    /// Read experiments from this folder instead of those compiled in
    #[arg(long, value_name = "DIR")]
    experiments: Option<PathBuf>,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("expected a number from 0 to 100".to_owned()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ProfileArg {
    Mini,
    Paper,
}

impl Reproduce {
    pub fn run(&self, json: bool, threads: Option<u16>) -> anyhow::Result<()> {
        let device = self.device.open()?;
        let library = match &self.experiments {
            Some(dir) => Library::from_dir(dir)?,
            None => Library::embedded(),
        };
        let experiments = library.load_many(&self.ids)?;
        check_rows(&experiments, &self.rows)?;
        let out = self.out_dir();
        let paper = matches!(self.profile, ProfileArg::Paper);
        if let Some(dir) = self.data.as_ref().filter(|dir| !dir.exists()) {
            bail!("--data {}: there is no such file or folder", dir.display());
        }
        // A dry run writes nothing that stays.
        let scratch = tempfile::tempdir().context("cannot make a folder")?;
        let specs = match self.dry_run {
            true => scratch.path().join("specs"),
            false => out.join("specs"),
        };
        if paper {
            library.write(&specs)?;
        }
        let request = Request {
            effort: match (self.quick, self.thorough) {
                (true, _) => Effort::Quick,
                (_, true) => Effort::Thorough,
                _ => Effort::Usual,
            },
            rows: self.rows.clone(),
            root: self.data.clone().filter(|_| paper),
            specs,
            profile: match self.profile {
                ProfileArg::Mini => Profile::Mini,
                ProfileArg::Paper => Profile::Paper,
            },
            seeds: self.seeds,
            smoke: self.smoke,
            search: self.search,
            fresh: self.fresh,
            machine: Some(Machine::on(std::slice::from_ref(&device))),
        };
        if paper && !self.dry_run {
            say("measuring a step of each network");
        }
        // Before the images, which two runs in one folder would write into each other.
        let mut store = if self.dry_run {
            Store::read(&out)?
        } else {
            Store::open(&out)?
        };
        let data = self.open_data(&experiments, &request, &out)?;
        let infos = data.infos();
        for warning in store.warnings() {
            say(&format!("warning: {warning}"));
        }
        let command = |id: &str| self.command(id, threads);
        let mut plan = Plan::new(&experiments, &request, &infos, &store, command)?;
        self.show_plan(&plan, json, &infos)?;
        let Found::Images(images) = data else {
            return Ok(());
        };
        if self.dry_run {
            return Ok(());
        }
        let mut display = Display::new(json);
        let done = run::run(
            &mut plan,
            &request,
            &out,
            &mut store,
            &images,
            &RealLab::on(&device),
            &mut display,
        );
        display.end();
        let summary = done?;
        let page = isqrt_experiments::report::page_path(&out);
        let text = format!(
            "{} run, {} done before, {} not run; report: {}",
            isqrt_train::counted(summary.ran, "cell"),
            summary.skipped,
            summary.not_run,
            page.display()
        );
        if json {
            say(&text);
            Ok(())
        } else {
            output::line(&text)
        }
    }

    fn out_dir(&self) -> PathBuf {
        if let Some(out) = &self.out {
            return out.clone();
        }
        if matches!(self.profile, ProfileArg::Paper) {
            let name = if self.smoke { "smoke-paper" } else { "paper" };
            return Path::new("out").join(name);
        }
        // Other images or another length are another run: the report of one does not hide that of the other.
        let kind = if self.smoke { "smoke" } else { "reproduce" };
        let data = self.data.as_deref().map_or_else(String::new, |dir| {
            let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
            let name = full.file_name().unwrap_or_default().to_string_lossy();
            format!("-{name}")
        });
        let length = match (self.smoke, self.quick, self.thorough) {
            (false, true, _) => "-quick",
            (false, _, true) => "-thorough",
            _ => "",
        };
        Path::new("out").join(format!("{kind}{data}{length}"))
    }

    /// The images, if anything is trained. A dry run writes none of the program's own.
    fn open_data(
        &self,
        experiments: &[Experiment],
        request: &Request,
        out: &Path,
    ) -> anyhow::Result<Found> {
        let trained: Vec<&Experiment> = experiments
            .iter()
            .filter(|e| needs_data(e, request))
            .collect();
        if trained.is_empty() {
            return Ok(Found::Images(run::Library::default()));
        }
        let source = match &self.data {
            Some(dir) => {
                let options = list_options(self.labels.clone(), self.cache.clone());
                Source::Users(dir.clone(), options)
            }
            None => Source::Own(out.join("data")),
        };
        if self.dry_run
            && let Some(infos) = source.describe_unwritten(&trained, self.smoke)?
        {
            return Ok(Found::Described(infos));
        }
        let broken = self
            .skip_broken
            .map_or(Broken::Fail, |percent| Broken::Skip {
                most: percent / 100.0,
            });
        let images = run::Library::open(&source, &trained, self.smoke, broken)?;
        Ok(Found::Images(images))
    }

    /// The command that runs one experiment again.
    fn command(&self, id: &str, threads: Option<u16>) -> String {
        let mut words = vec!["isqrt reproduce".to_owned(), id.to_owned()];
        let mut flag = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                words.push(format!("--{name} {value}"));
            }
        };
        flag(
            "device",
            Some(self.device.device.to_string()).filter(|d| d != "auto"),
        );
        flag("data", self.data.as_deref().map(quoted));
        flag("labels", self.labels.clone());
        flag("cache", self.cache.as_deref().map(quoted));
        flag("skip-broken", self.skip_broken.map(|p| p.to_string()));
        flag("out", Some(quoted(&self.out_dir())));
        flag("seeds", self.seeds.map(|s| s.to_string()));
        for row in &self.rows {
            flag("row", Some(quoted(Path::new(row))));
        }
        flag("threads", threads.map(|t| t.to_string()));
        flag("experiments", self.experiments.as_deref().map(quoted));
        if matches!(self.profile, ProfileArg::Paper) {
            words.push("--profile paper".to_owned());
        }
        for (flag, wanted) in [
            ("--quick", self.quick),
            ("--thorough", self.thorough),
            ("--search", self.search),
        ] {
            if wanted {
                words.push(flag.to_owned());
            }
        }
        if self.smoke {
            words.push("--smoke".to_owned());
        }
        words.push("--fresh".to_owned());
        words.join(" ")
    }

    fn show_plan(&self, plan: &Plan, json: bool, data: &Infos) -> anyhow::Result<()> {
        if json {
            if self.dry_run {
                for p in &plan.experiments {
                    for cell in &p.cells {
                        output::json(&serde_json::json!({
                            "experiment": p.experiment.id,
                            "cell": cell.name(),
                            "profile": p.profile,
                            "seed": cell.seed,
                            "state": cell.state,
                            "seconds": cell.seconds,
                        }))?;
                    }
                }
            }
            return Ok(());
        }
        // Before the table, which is what people look for.
        if self.dry_run {
            for (p, cell) in plan.todo() {
                let seed = cell.seed.map_or_else(String::new, |s| format!(" seed {s}"));
                output::line(&format!(
                    "  {} {}{seed}: {}",
                    p.experiment.id,
                    cell.name(),
                    duration(cell.seconds)
                ))?;
            }
        }
        let mut rows = Vec::new();
        let mut reasons = std::collections::BTreeSet::new();
        for p in &plan.experiments {
            let count = |f: &dyn Fn(&State) -> bool| p.cells.iter().filter(|c| f(&c.state)).count();
            let todo = p.cells.iter().filter(|c| c.state == State::Todo);
            rows.push(vec![
                p.experiment.id.clone(),
                count(&|s| *s == State::Todo).to_string(),
                count(&|s| *s == State::Done).to_string(),
                count(&|s| matches!(s, State::NotRun(_))).to_string(),
                duration(todo.map(|c| c.seconds).sum()),
            ]);
            for cell in &p.cells {
                if let State::NotRun(why) = &cell.state {
                    reasons.insert(format!("{}: {why}", p.experiment.id));
                }
            }
        }
        output::table(
            &["experiment", "to run", "done", "not run", "one by one"],
            rows,
            1,
        )?;
        let names: std::collections::BTreeSet<&str> = (data.own.values())
            .chain(&data.users)
            .map(|info| info.name.as_str())
            .collect();
        for name in names {
            output::line(&format!("data: {name}"))?;
        }
        for reason in reasons {
            output::line(&format!("not run: {reason}"))?;
        }
        let threads = run::threads();
        let left = plan.seconds_left(threads);
        let cells = plan.experiments.iter().flat_map(|p| &p.cells);
        let missing = cells
            .filter(|c| matches!(c.state, State::NotRun(_)))
            .count();
        let without = match missing {
            0 => String::new(),
            n => format!(", without the {n} not run"),
        };
        if matches!(self.profile, ProfileArg::Paper) {
            return output::line(&format!(
                "estimate: {:.1} hours on this device (cpu, {threads} threads), from a measured step of each \
                 network{without}",
                left / 3600.0
            ));
        }
        output::line(&format!(
            "estimate: {}, trainings side by side on {threads} threads{without}",
            duration(left)
        ))
    }
}

/// Rows that are asked for are there.
fn check_rows(experiments: &[Experiment], rows: &[String]) -> anyhow::Result<()> {
    for row in rows {
        if experiments.iter().all(|e| e.row(row).is_none()) {
            let all = experiments.iter().flat_map(|e| &e.rows);
            let near = isqrt_models::nearest(row, all.map(|r| r.id.as_str()));
            let hint = isqrt_models::hint(near.as_deref());
            bail!("--row {row}: no experiment of this run has such a row{hint}");
        }
    }
    Ok(())
}

/// The images, or only what is known of them without writing them.
enum Found {
    Images(run::Library),
    Described(Infos),
}

impl Found {
    fn infos(&self) -> Infos {
        match self {
            Self::Images(images) => images.infos(),
            Self::Described(infos) => infos.clone(),
        }
    }
}

/// A path for a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
