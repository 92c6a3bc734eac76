//! The page: a minijinja template with escaping on; only the drawings are put in as they are.

use super::model::Page;
use super::plot::STYLE;
use crate::error::Result;

/// The whole page as one text without references to other files.
pub(super) fn render(page: &Page) -> Result<String> {
    let mut env = minijinja::Environment::new();
    env.add_template("page.html", include_str!("page.html"))?;
    let template = env.get_template("page.html")?;
    Ok(template.render(minijinja::context! {
        page => minijinja::value::Serde(page),
        plot_style => STYLE,
    })?)
}
