//! File formats that data sets come in and that no crate reads as they need it.

pub mod matlab;
pub mod matlab_writer;
pub mod tar;
pub(crate) mod tar_index;
