# Every recipe is one cargo command; without just, type that command.

# List the recipes.
default:
    @just --list

# Tables and figures of the paper beside this machine's; `just reproduce --help` has the flags.
reproduce *ARGS:
    cargo reproduce {{ARGS}}

# All tests.
test *ARGS:
    cargo test --workspace {{ARGS}}

# The slow tests as well: every backbone with every head.
test-all:
    cargo test --workspace -- --include-ignored

# Formatting and clippy, warnings as errors.
lint:
    cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings

# Speed of the layer and of networks; `just bench --help` has the cases.
bench *ARGS:
    cargo run --release --package isqrt -- bench {{ARGS}}

# API documentation in target/doc.
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
