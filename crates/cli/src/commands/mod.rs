//! One file a command.

pub mod bench;
pub mod classify;
pub mod convert;
pub mod data;
pub mod features;
pub mod iterations;
pub mod models;
pub mod report;
pub mod reproduce;
mod weights;
