# Every recipe is one cargo command; without just, type that command.

# List the recipes.
default:
    @just --list

# Tables and figures of the paper beside this machine's; `just reproduce --help` has the flags.
reproduce *ARGS:
    cargo reproduce {{ARGS}}

# Keep the results of out/reproduce and make the pages that show them.
records:
    cargo run --release --package isqrt -- report out/reproduce --archive experiments/records --results docs/results.md --tables README.md

# All tests.
test *ARGS:
    cargo test --workspace {{ARGS}}

# The slow tests as well: every backbone with every head, listings as long as ImageNet's.
test-all:
    cargo test --workspace -- --include-ignored

# Damaged files of every kind, for SECONDS.
fuzz SECONDS="600":
    ISQRT_FUZZ_SECONDS={{SECONDS}} cargo test --workspace --test hostile -- --nocapture

# MNIST and CIFAR, which need three hundred more crates.
test-toy:
    cargo test --package isqrt-datasets --features toy --lib toy

# Formatting and clippy, warnings as errors.
lint:
    cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings

# Speed of the layer, of networks and of loading; `just bench --help` has the cases.
bench *ARGS:
    cargo run --release --package isqrt -- bench {{ARGS}}

# API documentation in target/doc.
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# With CUDA (docs/cuda.md).
gpu:
    cargo gpu

# The feature cuda on a machine without a GPU.
check-cuda:
    tools/cuda/check.sh
