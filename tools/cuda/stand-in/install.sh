#!/bin/sh
# Builds the library in release and installs it with its links into a folder.
# usage: install.sh FOLDER
set -eu
folder=${1:?usage: install.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/target}
# The machine's own instructions: without them each fused multiply-add is a call.
RUSTFLAGS="-C target-cpu=native" CARGO_TARGET_DIR="$target" \
    cargo build --release --manifest-path "$here/Cargo.toml"
mkdir -p "$folder"
cp "$target/release/libcuda_stand_in.so" "$folder/.libcuda_stand_in.so.new"
# A rename, so that no program sees half a library.
mv "$folder/.libcuda_stand_in.so.new" "$folder/libcuda_stand_in.so"
for name in cuda cublas cublasLt curand cudnn cusolver nccl nvrtc; do
    [ -L "$folder/lib$name.so" ] || ln -s libcuda_stand_in.so "$folder/lib$name.so"
done
# By this name programs look for NCCL first.
[ -L "$folder/libnccl.so.2" ] || ln -s libcuda_stand_in.so "$folder/libnccl.so.2"
