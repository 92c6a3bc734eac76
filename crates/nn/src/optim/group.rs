//! Groups of parameters by the pattern of their names.

use candle_core::Var;
use serde::{Deserialize, Serialize};

use super::{Decay, check, check_positive};
use crate::{Result, Vars};

/// Parameters that learn or decay at their own pace, as factors of what the others have. In TOML:
/// `{ pattern = "classifier.*", lr_factor = 10 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Their names; each `*` stands for any characters, dots too. Of several groups that a
    /// parameter matches the first one has it.
    pub pattern: String,
    /// Times the learning rate; 1 by default, 0 for parameters that stay.
    #[serde(default = "one")]
    pub lr_factor: f64,
    /// Times the weight decay; 1 by default.
    #[serde(default = "one")]
    pub decay_factor: f64,
}

fn one() -> f64 {
    1.0
}

impl ParamGroup {
    /// Parameters of these names, with both factors 1.
    #[must_use]
    pub fn new(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            lr_factor: 1.0,
            decay_factor: 1.0,
        }
    }

    /// Whether a parameter has such a name.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        matches(self.pattern.as_bytes(), name.as_bytes())
    }
}

/// The last `*` takes as little as it can, and more where the rest then fails.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // Place after the last star, and where in the name it was tried.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            p += 1;
            star = Some((p, n));
        } else if p < pattern.len() && pattern[p] == name[n] {
            p += 1;
            n += 1;
        } else if let Some((after, tried)) = star {
            (p, n) = (after, tried + 1);
            star = Some((after, n));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

/// A parameter and what it learns by.
pub(super) struct Member<'a> {
    pub(super) name: &'a str,
    pub(super) parameter: &'a Var,
    pub(super) lr_factor: f64,
    pub(super) weight_decay: f64,
}

/// All parameters, with the factors of their groups.
pub(super) fn members<'a>(
    vars: &'a Vars,
    groups: &[ParamGroup],
    weight_decay: f64,
    decay: Decay,
) -> Result<Vec<Member<'a>>> {
    check_positive("weight_decay", weight_decay)?;
    for group in groups {
        check_positive("group.lr_factor", group.lr_factor)?;
        check_positive("group.decay_factor", group.decay_factor)?;
        // A misspelt pattern would otherwise train at the wrong rate without a word.
        check(
            vars.parameters().any(|(name, _)| group.matches(name)),
            "group.pattern",
            &group.pattern,
            "a pattern that matches a parameter",
        )?;
    }
    let members = vars.parameters().map(|(name, parameter)| {
        let group = groups.iter().find(|group| group.matches(name));
        let (lr_factor, decay_factor) = group.map_or((1.0, 1.0), |g| (g.lr_factor, g.decay_factor));
        let decays = decay == Decay::All || parameter.rank() >= 2;
        Member {
            name,
            parameter,
            lr_factor,
            weight_decay: if decays {
                weight_decay * decay_factor
            } else {
                0.0
            },
        }
    });
    Ok(members.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_match_any_run() {
        for (pattern, name, expected) in [
            ("fc.weight", "fc.weight", true),
            ("fc.*", "fc.weight", true),
            ("fc.*", "fc", false),
            ("*.bias", "layer1.0.conv.bias", true),
            ("layer1.*.weight", "layer1.0.conv.weight", true),
            ("layer1.*.weight", "layer10.conv.weight", false),
            ("*a*ab", "aaaab", true),
            ("*a*ab", "aaaba", false),
            ("*", "", true),
            ("", "a", false),
            ("**b", "ab", true),
        ] {
            let found = ParamGroup::new(pattern).matches(name);
            assert_eq!(found, expected, "{pattern} and {name}");
        }
    }
}
