//! The pages: minijinja templates with escaping on; only style and drawings are put in as they are.

use super::plot;
use crate::error::Result;
use serde::Serialize;

/// A whole page as one text without references to other files, from a template that shows `page`.
pub(super) fn render(template: &str, page: &impl Serialize) -> Result<String> {
    let mut env = minijinja::Environment::new();
    // The ending makes minijinja escape.
    env.add_template("page.html", template)?;
    let template = env.get_template("page.html")?;
    Ok(template.render(minijinja::context! {
        page => minijinja::value::Serde(page),
        style => format!("{}{}", include_str!("page.css"), plot::STYLE),
    })?)
}
