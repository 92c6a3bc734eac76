#!/usr/bin/env bash
# Builds isqrt with CUDA and checks it on a machine without a GPU, by the stand-in for CUDA's libraries
# (tools/cuda/stand-in): the tests of the feature, and isqrt doctor. Some minutes the first time.
#   usage: tools/cuda/check.sh [FOLDER for compiler and stand-in; default target/cuda]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/cuda}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

command -v nvcc >/dev/null || [ -e "$folder/env.sh" ] || tools/cuda/toolkit.sh "$folder"
if [ -e "$folder/env.sh" ]; then
    # shellcheck source=/dev/null
    source "$folder/env.sh"
fi
tools/cuda/stand-in/install.sh "$folder/stand-in"

target=x86_64-unknown-linux-gnu
cargo gpu
isqrt=${CARGO_TARGET_DIR:-target}/$target/release/isqrt
echo "== the kernels, as GPUs have them"
newest=$(ls -t "${CARGO_TARGET_DIR:-target}/$target"/release/build/isqrt-device-*/out/symmetric.ptx | head -n 1)
tools/cuda/assemble.sh "$(dirname "$newest")"
echo "== the program starts without CUDA's libraries"
"$isqrt" doctor --help >/dev/null
(LD_LIBRARY_PATH='' "$isqrt" doctor --device cuda:0 2>&1 || true) | tail -n 1
echo "== tests, on the stand-in"
export LD_LIBRARY_PATH=$folder/stand-in
tests() {
    # With the program's own package, so that features are those of cargo gpu and nothing is compiled twice.
    cargo test --release --target "$target" --features isqrt/cuda --package isqrt --package isqrt-linalg \
        --package isqrt-nn --package isqrt-train --test cuda \
        --config "target.$target.rustflags = [\"--cfg\", \"feature=\\\"dynamic-loading\\\"\"]" -- "$@"
}
STAND_IN_DEVICES=2 tests
echo "== networks whose maps cuDNN refuses when it runs, on the stand-in"
STAND_IN_REFUSES=channels-last tests network block conv timed
echo "== algorithms that fail while they are timed, on the stand-in"
STAND_IN_REFUSES=first-algorithm tests timed
echo "== a training, on the stand-in"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for precision in f32 bf16; do
    "$isqrt" train experiments/smoke/e10-isqrt.toml --device cuda:0 --smoke 3 --set precision="$precision" --out "$scratch/$precision"
    "$isqrt" eval "$scratch/$precision" --device cuda:0
done
echo "== a kernel that does not take the features, in a dry run"
if "$isqrt" train experiments/smoke/e10-isqrt.toml --device cuda:0 --dry-run --set gpu.layer=cluster \
    --set precision=f64 >/dev/null 2>"$scratch/said"; then
    echo "the cluster computes f64?" >&2
    exit 1
fi
tail -n 1 "$scratch/said"
grep -q 'cluster.*gpu.layer' "$scratch/said"
echo "== a training on two GPUs, on the stand-in"
STAND_IN_DEVICES=2 "$isqrt" train experiments/smoke/e10-isqrt.toml --device cuda:0,1 --smoke 3 --out "$scratch/two"
echo "== memory that runs out, on the stand-in"
if STAND_IN_MEMORY_MIB=48 "$isqrt" train experiments/smoke/e10-isqrt.toml --device cuda:0 --smoke 2 --set batch=256 \
    --out "$scratch/memory" 2>"$scratch/said"; then
    echo "256 images fit into 48 MiB?" >&2
    exit 1
fi
tail -n 1 "$scratch/said"
grep -q 'out of memory.*accumulate = ' "$scratch/said"
echo "== isqrt doctor, on the stand-in"
"$isqrt" doctor --device cuda:0
