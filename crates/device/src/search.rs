//! How the algorithms of convolutions are found.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the algorithm of a convolution is found on a GPU, among those that give the same bits each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Search {
    /// By cuDNN's own ranking: the same one in each run.
    #[default]
    Ranked,
    /// By the time that each takes at the first pass of a shape, on results of its own. Another run, or another
    /// GPU of the same run, may find another one and so round differently: where TF32 is allowed, also one that
    /// does not round to it.
    Timed,
}

impl Search {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Ranked, Self::Timed];

    /// Its name in specs and on command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ranked => "ranked",
            Self::Timed => "timed",
        }
    }
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Search {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|search| search.name() == name);
        found.ok_or_else(|| {
            format!("algorithms of convolutions are found `ranked` or `timed`, not `{name}`")
        })
    }
}

static TIMED: AtomicBool = AtomicBool::new(false);

/// How the whole program finds algorithms of convolutions from now on; [`Search::Ranked`] at first.
pub fn set_search(search: Search) {
    TIMED.store(search == Search::Timed, Ordering::Relaxed);
}

/// What [`set_search`] said last.
#[must_use]
pub fn search() -> Search {
    match TIMED.load(Ordering::Relaxed) {
        true => Search::Timed,
        false => Search::Ranked,
    }
}
