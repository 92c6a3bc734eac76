//! The TOML files of `experiments/`, compiled into the program so that it works anywhere.
//!
//! Adding an experiment is one file and one line here; a test compares this list with the folder.

macro_rules! embed {
    ($path:literal) => {
        (
            $path,
            include_str!(concat!("../../../../experiments/", $path)),
        )
    };
}

/// Path below `experiments/` and text of each file.
pub(super) const FILES: &[(&str, &str)] = &[
    embed!("decomposition-time.toml"),
    embed!("iterations.toml"),
    embed!("meta-layer-time.toml"),
    embed!("_base/rates.toml"),
    embed!("_base/timing.toml"),
    embed!("_base/training.toml"),
];
