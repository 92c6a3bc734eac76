//! The TOML files of `experiments/`, compiled into the program so that it works anywhere; `build.rs`
//! lists them.

/// Path below `experiments/` and text of each file.
pub(super) const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
