//! The names that other programs give to our parameters.

use crate::ModelSpec;

/// In which order a file has the entries of a symmetric matrix.
///
/// The authors' PyTorch code went along the rows of the lower triangle until commit `e68a5ee` of
/// 26 December 2018, and along those of the upper one since (jiangtaoxie/fast-MPN-COV, issue 20).
/// Both have the same keys and shapes; the wrong one gives the accuracy of chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Triangle {
    /// Row by row, from the diagonal on; ours.
    Upper,
    /// Row by row, up to the diagonal.
    Lower,
}

impl std::fmt::Display for Triangle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Upper => "upper",
            Self::Lower => "lower",
        })
    }
}

/// Names of one program for a network's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// What people call it.
    pub name: &'static str,
    /// Prefixes of a backbone's parameters: ours (after `backbone.`) and theirs. The first that fits.
    pub backbone: &'static [(&'static str, &'static str)],
    /// Prefix of a linear classifier.
    pub linear: &'static str,
    /// Prefixes of a classifier with hidden layers, the last one last; empty where it has none.
    pub hidden: &'static [&'static str],
    /// Whether hidden layers of the classifier are convolutions over whole maps there.
    pub hidden_convolutions: bool,
    /// The order of triangles, where files of this layout can have but one.
    pub triangle: Option<Triangle>,
}

impl Layout {
    /// Ours, where every name stays what it is.
    pub const OWN: Self = Self {
        name: "isqrt",
        backbone: &[],
        linear: "",
        hidden: &[],
        hidden_convolutions: false,
        triangle: Some(Triangle::Upper),
    };

    /// That of torchvision's and timm's ResNets, and of the authors' released `mpncovresnet50` and
    /// `mpncovresnet101`, of which there are some in either order.
    pub const FLAT: Self = Self {
        name: "flat",
        backbone: &[("", "")],
        linear: "fc.",
        hidden: &[],
        hidden_convolutions: false,
        triangle: None,
    };

    /// The name in such files of a parameter or buffer of ours; none where it has no place there.
    #[must_use]
    pub fn name_of(&self, ours: &str, model: &ModelSpec) -> Option<String> {
        if *self == Self::OWN {
            return Some(ours.to_owned());
        }
        if let Some(rest) = ours.strip_prefix("backbone.") {
            return self.backbone.iter().find_map(|(ours, theirs)| {
                let rest = rest.strip_prefix(ours)?;
                Some(format!("{theirs}{rest}"))
            });
        }
        let Some(rest) = ours.strip_prefix("classifier.") else {
            return Some(ours.to_owned());
        };
        let hidden = model.classifier.hidden.len();
        if hidden == 0 {
            return Some(format!("{}{rest}", self.linear));
        }
        if hidden + 1 != self.hidden.len() {
            return None;
        }
        let (place, rest) = match rest.strip_prefix("hidden").and_then(|r| r.split_once('.')) {
            Some((place, rest)) => (place.parse().ok()?, rest),
            None => (hidden, rest),
        };
        Some(format!("{}{rest}", self.hidden.get(place)?))
    }

    /// All that files for this network may have, ours first.
    pub(super) fn all(model: &ModelSpec) -> crate::Result<Vec<Self>> {
        let others = model.backbone.entry()?.layouts();
        Ok([Self::OWN]
            .into_iter()
            .chain(others.iter().copied())
            .collect())
    }
}

/// For each column of a classifier in our order, its column in the order of the lower triangle, for
/// matrices of `n` rows.
pub(super) fn from_lower(n: usize) -> Vec<u32> {
    let upper = (0..n).flat_map(|row| (row..n).map(move |column| (row, column)));
    upper
        .map(|(row, column)| (column * (column + 1) / 2 + row) as u32)
        .collect()
}

/// The inverse of [`from_lower`].
pub(super) fn to_lower(n: usize) -> Vec<u32> {
    let mut inverse = vec![0; n * (n + 1) / 2];
    for (ours, theirs) in from_lower(n).into_iter().enumerate() {
        inverse[theirs as usize] = ours as u32;
    }
    inverse
}
