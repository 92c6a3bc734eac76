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

/// What serde says of a value, with types as people call them.
#[must_use]
pub fn in_words(message: &str) -> String {
    let mut message = message.to_owned();
    for (types, words) in [
        (
            &["usize", "u64", "u32", "u16", "u8"][..],
            "a whole number from 0 on",
        ),
        (&["i64", "i32"], "a whole number"),
        (&["f64", "f32"], "a number"),
    ] {
        for kind in types {
            message = message.replace(&format!("expected {kind}"), &format!("expected {words}"));
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::in_words;

    #[test]
    fn types_have_names_that_people_use() {
        let said = in_words("invalid type: floating point `2.5`, expected usize");
        assert_eq!(
            said,
            "invalid type: floating point `2.5`, expected a whole number from 0 on"
        );
        let said = in_words("invalid type: string \"a\", expected f64");
        assert_eq!(said, "invalid type: string \"a\", expected a number");
    }
}
