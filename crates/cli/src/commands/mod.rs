//! One file a command.

pub mod bench;
pub mod classify;
pub mod convert;
pub mod data;
mod device;
pub mod doctor;
pub mod eval;
pub mod features;
pub mod iterations;
pub mod models;
pub mod report;
pub mod reproduce;
pub mod train;
mod weights;
