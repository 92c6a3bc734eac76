//! The report as Markdown, for a terminal or a pull request.

use super::model::{Entry, Page, Section, Table};
use crate::error::Result;
use std::fmt::Write as _;

/// The whole report without the figures.
pub(super) fn render(page: &Page) -> Result<String> {
    let mut out = String::from("# iSQRT-COV, reproduced\n\n");
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "{} of {} cells done; {}.",
        page.done, page.cells, page.date
    );
    if page.smoke {
        out.push_str("\n**Smallest size: a test of the program, not a result.**\n");
    }
    for (name, value) in &page.origin {
        let _ = write!(out, "\n- {name}: {value}");
    }
    out.push('\n');
    for warning in &page.warnings {
        let _ = writeln!(out, "\n> {warning}");
    }
    if page.unverified {
        out.push_str("\nPaper values marked (unverified) were recalled, not read in the paper.\n");
    }
    for section in &page.sections {
        render_section(&mut out, section);
    }
    let _ = writeln!(out, "\n## How claims are decided\n\n{}", page.criterion);
    Ok(out)
}

fn render_section(out: &mut String, s: &Section) {
    let _ = writeln!(
        out,
        "\n## {}\n\n`{}`. {}. {}\n",
        s.title, s.id, s.paper_item, s.about
    );
    table(out, &s.table);
    for sentence in &s.orderings {
        let _ = writeln!(out, "\n**{sentence}**");
    }
    let _ = writeln!(out, "\n{}\n", s.caveat);
    for v in &s.verdicts {
        let _ = writeln!(
            out,
            "- **{}**: {}. {}",
            v.words,
            v.text,
            v.because.join(" ")
        );
    }
    for rates in &s.rates {
        let _ = writeln!(
            out,
            "\nLearning rates with `{}`, validation error in % ({}):\n",
            rates.recipe, rates.note
        );
        let mut head = vec!["head".to_owned(), "rate".to_owned()];
        head.extend(rates.grid.iter().cloned());
        line(out, &head);
        line(out, &vec!["---".to_owned(); head.len()]);
        for r in &rates.rows {
            let mut row = vec![r.label.clone(), r.lr.clone()];
            row.extend(r.errors.iter().map(|(text, chosen)| {
                if *chosen {
                    format!("**{text}**")
                } else {
                    text.clone()
                }
            }));
            line(out, &row);
        }
    }
    if !s.not_run.is_empty() {
        out.push_str("\nNot run:\n\n");
        for reason in &s.not_run {
            let _ = writeln!(out, "- {reason}");
        }
    }
    out.push('\n');
    for (name, value) in &s.facts {
        let _ = writeln!(out, "- {name}: {value}");
    }
    let _ = writeln!(out, "\nAgain: `{}`", s.command);
}

/// A kept result: table, what it says of the paper, and where it comes from.
pub(crate) fn result(out: &mut String, s: &Section, name: &str) {
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "\n## {}\n\n`{name}`. {}. {}\n",
        s.title, s.paper_item, s.about
    );
    table(out, &s.table);
    for sentence in &s.orderings {
        let _ = writeln!(out, "\n**{sentence}**");
    }
    if !s.caveat.is_empty() {
        let _ = writeln!(out, "\n{}", s.caveat);
    }
    if !s.verdicts.is_empty() {
        out.push('\n');
    }
    for v in &s.verdicts {
        let because = v.because.join(" ");
        let _ = writeln!(out, "- **{}**: {}. {because}", v.words, v.text);
    }
    out.push('\n');
    for (name, value) in &s.facts {
        let _ = writeln!(out, "- {name}: {value}");
    }
}

/// A table with its headings.
pub(crate) fn table(out: &mut String, table: &Table) {
    let mut head = Vec::new();
    for h in &table.head {
        let mut text = h.label.clone();
        if !h.unit.is_empty() {
            let _ = write!(text, " ({})", h.unit);
        }
        if !h.who.is_empty() {
            let _ = write!(text, ", {}", h.who);
        }
        head.push(text);
    }
    line(out, &head);
    line(out, &vec!["---".to_owned(); head.len()]);
    for row in &table.rows {
        line(out, &row.iter().map(entry).collect::<Vec<_>>());
    }
}

fn entry(e: &Entry) -> String {
    let mut text = e.text.clone();
    if !e.note.is_empty() {
        let _ = write!(text, " {}", e.note);
    }
    if e.unverified {
        text.push_str(" (unverified)");
    }
    if !e.difference.is_empty() {
        let _ = write!(text, " ({} to the paper)", e.difference);
    }
    text
}

fn line(out: &mut String, cells: &[String]) {
    let cells: Vec<String> = cells
        .iter()
        .map(|c| c.replace('|', "\\|").replace('\n', " "))
        .collect();
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}
