//! The page of training runs as Markdown, without its figures.

use super::page::{Page, RunSection};
use crate::report::markdown::table;
use std::fmt::Write as _;

pub(super) fn render(page: &Page) -> String {
    // Writing into a String cannot fail.
    let mut out = format!("# Training: {}\n\n", page.title);
    table(&mut out, &page.table);
    for run in &page.runs {
        section(&mut out, run);
    }
    out
}

fn section(out: &mut String, run: &RunSection) {
    let _ = writeln!(out, "\n## {}\n\n{}", run.name, run.status);
    if !run.title.is_empty() {
        let _ = writeln!(out, "\n{}", run.title);
    }
    for warning in &run.warnings {
        let _ = writeln!(out, "\n> {warning}");
    }
    out.push('\n');
    for (name, value) in &run.facts {
        let _ = writeln!(out, "- {name}: {value}");
    }
    let tables = [
        ("Epochs", &run.epochs),
        ("Worst classes", &run.worst),
        ("Largest confusions", &run.confusions),
    ];
    for (title, rows) in tables {
        if let Some(rows) = rows {
            let _ = writeln!(out, "\n### {title}\n");
            table(out, rows);
        }
    }
}
