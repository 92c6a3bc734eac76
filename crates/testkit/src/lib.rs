//! Gradient checks, comparisons and golden files for the tests of this workspace.
