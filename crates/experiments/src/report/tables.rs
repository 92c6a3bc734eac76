//! One table as comma-separated values, a line a number, and for LaTeX.

use super::model::{self, Entry, Heading, Table};
use crate::machine::date;
use crate::plan::Planned;
use crate::results::Results;
use crate::spec::Experiment;
use crate::stats::sd;
use std::fmt::Write as _;

/// Names of the columns.
const HEAD: [&str; 20] = [
    "experiment",
    "row",
    "label",
    "metric",
    "on",
    "unit",
    "paper",
    "paper_setting",
    "paper_source",
    "paper_verified",
    "ours",
    "spread",
    "low",
    "high",
    "runs",
    "difference",
    "seconds",
    "device",
    "data",
    "finished",
];

/// For each row and column the paper's numbers and ours; empty where there is none.
pub(super) fn csv(planned: &Planned, results: &Results<'_>) -> String {
    let e = &planned.experiment;
    let mut writer = csv::Writer::from_writer(Vec::new());
    // Writing into memory cannot fail.
    let _ = writer.write_record(HEAD);
    for row in &e.rows {
        for column in &e.columns {
            let sample = results.sample(&row.id, &column.metric, &column.on);
            let mut papers: Vec<Option<&crate::spec::PaperValue>> = row
                .paper
                .iter()
                .filter(|p| p.metric == column.metric && p.on == column.on)
                .map(Some)
                .collect();
            if papers.is_empty() && sample.is_none() {
                continue;
            }
            if papers.is_empty() {
                papers.push(None);
            }
            let of_row: Vec<_> = results.of_row(&row.id).collect();
            let record = of_row
                .iter()
                .find(|r| crate::run::is_on(&column.on, &r.on) && r.get(&column.metric).is_some());
            let number = |value: Option<f64>| {
                let value = value.filter(|v| v.is_finite());
                value.map_or_else(String::new, |v| v.to_string())
            };
            let mean = sample.as_ref().map(|s| s.mean());
            let interval = sample.as_ref().and_then(|s| s.interval());
            let spread = (sample.as_ref())
                .filter(|s| s.values.len() > 1)
                .map(|s| sd(&s.numbers()));
            for paper in papers {
                let compared = sample.as_ref().filter(|s| model::compares(planned, s));
                let difference = compared.zip(paper).map(|(s, p)| s.mean() - p.value);
                let words = sample.as_ref().and_then(|s| s.words());
                let text =
                    |f: fn(&crate::spec::PaperValue) -> String| paper.map_or_else(String::new, f);
                let _ = writer.write_record([
                    e.id.clone(),
                    row.id.clone(),
                    row.label.clone(),
                    column.metric.clone(),
                    column.on.clone(),
                    column.unit.clone(),
                    text(|p| p.value.to_string()),
                    text(|p| p.setting.clone()),
                    text(|p| p.source.clone()),
                    text(|p| p.verified.to_string()),
                    words.map_or_else(|| number(mean), str::to_owned),
                    number(spread),
                    number(interval.map(|i| i.0)),
                    number(interval.map(|i| i.1)),
                    sample.as_ref().map_or(0, |s| s.values.len()).to_string(),
                    number(difference),
                    number(record.map(|r| r.seconds)),
                    record.map_or_else(String::new, |r| {
                        format!("{} {}", r.machine.device, r.machine.cpu)
                    }),
                    record
                        .and_then(|r| r.data.as_ref())
                        .map_or_else(String::new, |d| d.name.clone()),
                    record.map_or_else(String::new, |r| date(r.finished)),
                ]);
            }
        }
    }
    let bytes = writer.into_inner().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A `table` environment with booktabs' rules.
pub(super) fn latex(e: &Experiment, table: &Table) -> String {
    let mut out = String::from("% \\usepackage{booktabs}\n\\begin{table}\n\\centering\n");
    // Writing into a String cannot fail.
    let _ = writeln!(out, "\\caption{{{}}}", tex(&e.title));
    let columns = table.head.len().saturating_sub(1);
    let _ = writeln!(out, "\\begin{{tabular}}{{l{}}}", "r".repeat(columns));
    out.push_str("\\toprule\n");
    let labels = table.head.iter().map(|h| tex(&h.label));
    let _ = writeln!(out, "{} \\\\", labels.collect::<Vec<_>>().join(" & "));
    let below = table.head.iter().map(|Heading { unit, who, .. }| {
        let parts = [unit.as_str(), who.as_str()];
        tex(&parts
            .into_iter()
            .filter(|p| !p.is_empty())
            .collect::<Vec<_>>()
            .join(", "))
    });
    let _ = writeln!(out, "{} \\\\", below.collect::<Vec<_>>().join(" & "));
    out.push_str("\\midrule\n");
    for row in &table.rows {
        let cells: Vec<String> = row.iter().map(entry).collect();
        let _ = writeln!(out, "{} \\\\", cells.join(" & "));
    }
    out.push_str("\\bottomrule\n\\end{tabular}\n\\end{table}\n");
    if table.rows.iter().flatten().any(|e| e.unverified) {
        out.push_str("% * recalled, not verified against the paper\n");
    }
    out
}

fn entry(e: &Entry) -> String {
    let mut text = tex(&e.text);
    if e.unverified {
        text.push_str("$^{*}$");
    }
    if !e.note.is_empty() {
        let _ = write!(text, " {{\\footnotesize {}}}", tex(&e.note));
    }
    text
}

/// Text for LaTeX.
fn tex(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\textbackslash{}"),
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                out.push('\\');
                out.push(c);
            }
            '~' => out.push_str("\\textasciitilde{}"),
            '^' => out.push_str("\\textasciicircum{}"),
            '±' => out.push_str("$\\pm$"),
            '²' => out.push_str("$^2$"),
            '×' => out.push_str("$\\times$"),
            '–' => out.push_str("--"),
            '\u{2212}' => out.push_str("$-$"),
            '√' => out.push_str("$\\surd$"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latex_takes_every_character() {
        assert_eq!(
            tex("50% of G²DeNet_1 & more"),
            "50\\% of G$^2$DeNet\\_1 \\& more"
        );
        assert_eq!(tex("1.2 ± 0.3"), "1.2 $\\pm$ 0.3");
    }
}
