//! The known name that a misspelt one may have meant.

/// A question after a message, if there is a name to ask for.
#[must_use]
pub fn hint(nearest: Option<&str>) -> String {
    nearest
        .map(|n| format!("; did you mean `{n}`?"))
        .unwrap_or_default()
}

/// The known name closest to `name`, if any is close at all.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    nearest_above(0.7, name, known).map(str::to_owned)
}

/// The same with another least similarity, from 0 to 1.
pub(crate) fn nearest_above<'a>(
    least: f64,
    name: &str,
    known: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    known
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(score, _)| *score > least)
        // The first with the fewest letters changed: `resnet51` is nearer to `resnet50` than to `resnet152`.
        .min_by(|a, b| {
            let edits = |k: &str| strsim::damerau_levenshtein(name, k);
            edits(a.1).cmp(&edits(b.1)).then(b.0.total_cmp(&a.0))
        })
        .map(|(_, k)| k)
}
