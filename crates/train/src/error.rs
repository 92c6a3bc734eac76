//! What can go wrong in training.

use std::path::PathBuf;

/// Errors of the training engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting out of its range, or that does not fit the data.
    #[error("{what} = {value}: {expected}")]
    Config {
        /// Name of the setting.
        what: &'static str,
        /// The value given.
        value: String,
        /// What it has to be.
        expected: String,
    },
    /// A mistake in an experiment file.
    #[error("{}", spec_message(file, *line, key, message))]
    Spec {
        /// The file, or the setting of the command line.
        file: String,
        /// From 1.
        line: Option<usize>,
        /// The key, with those of the tables around it; empty where it is about the file.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// The loss left the numbers.
    #[error("the loss is {0}")]
    Loss(f64),
    /// A run left the numbers.
    #[error(
        "step {step} of epoch {epoch}: {problem}: training diverged; a smaller learning rate may help"
    )]
    NonFinite {
        /// From 1.
        epoch: usize,
        /// Step within the epoch, from 1.
        step: usize,
        /// What is not finite, and where first.
        problem: String,
    },
    /// A run folder that cannot be used.
    #[error("{}: {message}", path.display())]
    Run {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        message: String,
    },
    /// A pass that the memory of the GPU does not hold.
    #[error("{problem}; {advice}")]
    OutOfMemory {
        /// Op, shape and sizes.
        problem: String,
        /// A batch that would fit, by estimate.
        advice: String,
    },
    /// An error of one of several GPUs.
    #[error("{device}: {source}")]
    Rank {
        /// Name of the device.
        device: String,
        /// What failed.
        source: Box<Error>,
    },
    /// Ranks that do not hear of each other.
    #[error("the ranks of the run do not go together: {0}")]
    Collective(String),
    /// An error within a step.
    #[error("step {step} of epoch {epoch}: {source}")]
    Step {
        /// From 1.
        epoch: usize,
        /// Step within the epoch, from 1.
        step: usize,
        /// What failed.
        source: Box<Error>,
    },
    /// An error while the network was evaluated after an epoch.
    #[error("evaluation after epoch {epoch}: {source}")]
    Evaluation {
        /// From 1.
        epoch: usize,
        /// What failed.
        source: Box<Error>,
    },
    /// The network's answers left the numbers.
    #[error("the network's output is not finite: its weights diverged in training")]
    Output,
    /// A file that cannot be used.
    #[error("{}: cannot be used: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        message: String,
    },
    /// An error of the data.
    #[error(transparent)]
    Data(#[from] isqrt_datasets::Error),
    /// An error of the network.
    #[error(transparent)]
    Model(#[from] isqrt_models::Error),
    /// An error of an op or the optimiser.
    #[error(transparent)]
    Nn(#[from] isqrt_nn::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// How the problem of an update begins that another rank has found.
pub(crate) const ELSEWHERE: &str = "a value of another rank is not finite";

/// `experiments/x.toml, line 3: `epoch` is not known; did you mean `epochs`?`
fn spec_message(file: &str, line: Option<usize>, key: &str, message: &str) -> String {
    let line = line.map_or_else(String::new, |line| format!(", line {line}"));
    let file = if file.is_empty() { "the spec" } else { file };
    match key {
        "" => format!("{file}{line}: {message}"),
        key => format!("{file}{line}: `{key}` {message}"),
    }
}

/// A text without the backtrace that candle's errors have behind them where `RUST_BACKTRACE` is set.
#[must_use]
pub fn without_backtrace(text: &str) -> String {
    let told = text
        .lines()
        .take_while(|line| !line.trim_start().starts_with("0: "));
    told.collect::<Vec<_>>().join(" ")
}

impl Error {
    /// Whether the GPU had no memory left.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        !self.is_of_the_ranks() && isqrt_device::is_out_of_memory(&self.to_string())
    }

    /// Whether it is that the ranks do not go together, which another rank may be the cause of.
    pub(crate) fn is_of_the_ranks(&self) -> bool {
        match self {
            Self::Collective(_) => true,
            Self::NonFinite { problem, .. } => problem.starts_with(ELSEWHERE),
            Self::Step { source, .. }
            | Self::Evaluation { source, .. }
            | Self::Rank { source, .. } => source.is_of_the_ranks(),
            _ => false,
        }
    }

    /// Whether numbers ran away: the loss, the network's output, or features that a covariance
    /// head refuses or whose eigendecomposition does not converge.
    #[must_use]
    pub fn is_divergence(&self) -> bool {
        use isqrt_models::Error as Model;
        match self {
            Self::NonFinite { .. } | Self::Output | Self::Loss(_) => true,
            Self::Step { source, .. }
            | Self::Evaluation { source, .. }
            | Self::Rank { source, .. } => source.is_divergence(),
            Self::Model(Model::Linalg(e)) => linalg_diverged(e),
            Self::Model(Model::Candle(e) | Model::Nn(isqrt_nn::Error::Candle(e)))
            | Self::Nn(isqrt_nn::Error::Candle(e))
            | Self::Candle(e) => candle_diverged(e),
            _ => false,
        }
    }
}

fn linalg_diverged(error: &isqrt_linalg::Error) -> bool {
    match error {
        isqrt_linalg::Error::NonFinite { .. } | isqrt_linalg::Error::Decomposition { .. } => true,
        isqrt_linalg::Error::Candle(e) => candle_diverged(e),
        _ => false,
    }
}

/// An error of a custom op comes through candle as a boxed `dyn Display`, which has lost its type:
/// inside that box, and nowhere else, the text decides. A test holds it against the types.
fn candle_diverged(error: &candle_core::Error) -> bool {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace { inner, .. }
        | Candle::Context { inner, .. }
        | Candle::WithPath { inner, .. } => candle_diverged(inner),
        Candle::Wrapped(e) => {
            let text = e.to_string();
            text.ends_with("is not finite") || text.ends_with("did not converge")
        }
        _ => false,
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    fn at_evaluation(source: Error) -> Error {
        Error::Evaluation {
            epoch: 1,
            source: Box::new(source),
        }
    }

    /// Every way by which an error of the covariance heads can come up.
    fn ways(make: &dyn Fn() -> isqrt_linalg::Error) -> [Error; 5] {
        let wrapped = || candle_core::Error::from(make());
        [
            isqrt_models::Error::from(make()).into(),
            isqrt_models::Error::from(wrapped()).into(),
            // From the backward pass, within checkpointed blocks too.
            isqrt_nn::Error::from(wrapped()).into(),
            wrapped().into(),
            isqrt_models::Error::from(isqrt_linalg::Error::from(wrapped().context("backward")))
                .into(),
        ]
    }

    #[test]
    fn a_head_that_meets_runaway_numbers_has_diverged() {
        use isqrt_linalg::Error as Linalg;
        let non_finite = || Linalg::NonFinite {
            index: 3,
            what: "a feature",
        };
        let decomposition = || Linalg::Decomposition {
            index: 3,
            what: "eigendecomposition",
        };
        for error in ways(&non_finite).into_iter().chain(ways(&decomposition)) {
            assert!(error.is_divergence(), "{error:?}");
            assert!(at_evaluation(error).is_divergence());
        }
    }

    #[test]
    fn other_errors_are_no_divergence_whatever_their_words() {
        use isqrt_linalg::Error as Linalg;
        let shape = || Linalg::Shape { shape: vec![1] };
        let finite = || Linalg::Option {
            option: "coefficients",
            value: "NaN".to_owned(),
            expected: "finite numbers",
        };
        for error in ways(&shape).into_iter().chain(ways(&finite)) {
            assert!(!at_evaluation(error).is_divergence());
        }
        let path = isqrt_datasets::Error::Config("a folder that is not finite".to_owned());
        assert!(!at_evaluation(path.into()).is_divergence());
    }
}
