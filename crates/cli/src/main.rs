//! The `isqrt` command.
fn main() {}
