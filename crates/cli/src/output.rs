//! Standard output: lines, JSON lines and tables. A closed pipe is not an error.

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use std::io::Write;

/// Prints a line.
pub fn line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(())
}

/// Prints an object on one line.
pub fn json(object: &impl serde::Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(object)?)
}

/// Prints a table; the first columns, as many as `left`, are aligned to the left.
pub fn table(head: &[&str], rows: Vec<Vec<String>>, left: usize) -> anyhow::Result<()> {
    let mut table = ruled(head, rows);
    for (i, column) in table.column_iter_mut().enumerate() {
        if i >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    line(&table.to_string())
}

/// Prints a table whose last column is sentences; they are broken into lines as a terminal is wide.
pub fn prose(head: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    let mut table = ruled(head, rows);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    line(&table.to_string())
}

/// With a line under the head and no other.
fn ruled(head: &[&str], rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    let style = TableStyle::new();
    table.load_style(style.header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(head);
    table.add_rows(rows);
    table
}

/// Whether the error is that nobody reads our output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// A number with three significant digits.
pub fn show(value: f64) -> String {
    isqrt_experiments::stats::show(value, None)
}
