#!/bin/sh
# Makes kernels.ptx anew; needs nvcc.
set -eu
cd "$(dirname "$0")"
nvcc -ptx -arch=compute_90 -O3 -std=c++17 kernels.cu -o - | sed -E '/^\/\//d; s/[[:space:]]+$//' |
    cat -s > kernels.ptx
