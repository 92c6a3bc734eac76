//! Experiments as data: specs, plan, runs, records and the report.
