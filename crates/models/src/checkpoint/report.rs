//! What became of each name in a checkpoint and in the network.

use super::Checkpoint;
use crate::names::nearest_above;

/// A tensor of another shape than the network's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misshapen {
    /// Name in the file.
    pub name: String,
    /// Shape in the file.
    pub found: Vec<usize>,
    /// Shape in the network.
    pub expected: Vec<usize>,
}

/// What a file gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Name of the layout whose names were found.
    pub layout: &'static str,
    /// Parameters and buffers that were taken.
    pub taken: usize,
    /// Parameters and buffers of the network that the file does not have: our name and the name
    /// looked for, if the layout has one.
    pub missing: Vec<(String, Option<String>)>,
    /// Tensors of the file that the network does not have.
    pub unused: Vec<String>,
    /// Tensors of another shape.
    pub misshapen: Vec<Misshapen>,
    /// Counters of batches, which nothing needs.
    pub counters: usize,
    /// The dictionary within the file that was taken, and the keys beside it.
    pub group: Option<String>,
    /// See `group`.
    pub others: Vec<String>,
    /// For each missing name the most similar unused one, if any is similar.
    nearest: Vec<Option<String>>,
}

/// Names of one kind that a complaint lists.
const LISTED: usize = 5;

impl Report {
    pub(super) fn new(layout: &'static str, file: &Checkpoint) -> Self {
        Self {
            layout,
            group: file.group().map(str::to_owned),
            others: file.others().to_vec(),
            ..Self::default()
        }
    }

    /// Whether nothing is missing, unused or of another shape.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.misshapen.is_empty()
    }

    pub(super) fn find_nearest(&mut self) {
        // Lists of thousands are of another network, where no name is near.
        if self.missing.len().saturating_mul(self.unused.len()) > 250_000 {
            self.nearest = vec![None; self.missing.len()];
            return;
        }
        // Names of other programs are short; the distance of long ones takes long.
        let unused = || self.unused.iter().map(String::as_str);
        let nearest = |name: &String| {
            let short = unused().filter(|other| other.len() <= 256);
            nearest_above(0.8, name, short).map(str::to_owned)
        };
        let names = self
            .missing
            .iter()
            .map(|(ours, theirs)| theirs.as_ref().unwrap_or(ours));
        self.nearest = names.map(nearest).collect();
    }

    /// One line a name that did not find its place; what a terminal would obey is escaped.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let missing = self
            .missing
            .iter()
            .zip(&self.nearest)
            .map(|((ours, theirs), nearest)| {
                let wanted = match theirs {
                    Some(theirs) if theirs != ours => format!("{ours} (looked for as {theirs})"),
                    _ => ours.clone(),
                };
                match nearest {
                    Some(nearest) => {
                        let nearest = nearest.escape_debug();
                        format!("missing: {wanted}; nearest unused: {nearest}")
                    }
                    None => format!("missing: {wanted}"),
                }
            });
        let misshapen = self.misshapen.iter().map(|m| {
            format!(
                "shape: {} is {:?}, the network needs {:?}",
                m.name.escape_debug(),
                m.found,
                m.expected
            )
        });
        let unused = self
            .unused
            .iter()
            .map(|name| format!("unused: {}", name.escape_debug()));
        missing.chain(misshapen).chain(unused).collect()
    }

    /// A sentence on what did not fit.
    pub(super) fn complaint(&self, model: &str) -> String {
        let mut kinds = Vec::new();
        let mut kind = |what: &str, count: usize| {
            if count > 0 {
                kinds.push(format!("{count} {what}"));
            }
        };
        kind("missing", self.missing.len());
        kind("of another shape", self.misshapen.len());
        kind("unused", self.unused.len());
        let lines = self.lines();
        // Some of each kind.
        let shown: Vec<&str> = ["missing", "shape", "unused"]
            .into_iter()
            .flat_map(|kind| {
                lines
                    .iter()
                    .filter(move |line| line.starts_with(kind))
                    .take(LISTED)
            })
            .map(String::as_str)
            .collect();
        let rest = match lines.len() - shown.len() {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        format!(
            "does not fit {model} (layout {}): {} taken, {}: {}{rest}",
            self.layout,
            self.taken,
            kinds.join(", "),
            shown.join("; ")
        )
    }
}
