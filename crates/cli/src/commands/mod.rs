//! One file a command.

pub mod bench;
pub mod iterations;
pub mod models;
pub mod report;
pub mod reproduce;
