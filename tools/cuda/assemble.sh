#!/usr/bin/env bash
# What NVIDIA's assembler makes of the kernels for the GPUs that they run on: that each is accepted, and how many registers
# threads spill to memory (more than a few outside of loops would be slow, and fails). Needs no GPU.
#   usage: tools/cuda/assemble.sh [-v] FOLDER with *.ptx      (-v: registers and shared memory of each kernel)
set -euo pipefail
verbose=
[ "${1:-}" != -v ] || { verbose=1; shift; }
[ $# = 1 ] || { echo "usage: $0 [-v] FOLDER" >&2; exit 2; }
said=$(mktemp)
trap 'rm -f "$said"' EXIT
spilling=0
for gpu in 80 86 89 90; do
    count=0
    for ptx in "$1"/*.ptx; do
        needs=$(sed -n 's/^\.target sm_\([0-9]*\).*/\1/p' "$ptx")
        [ "$needs" -le "$gpu" ] || continue
        ptxas -arch="sm_$gpu" -v "$ptx" -o /dev/null 2>"$said" || { cat "$said" >&2; exit 1; }
        count=$((count + $(grep -c 'Compiling entry' "$said")))
        awk -v gpu="$gpu" -v verbose="$verbose" '
            /Compiling entry/ { split($0, part, "\047"); name = part[2] }
            /spill stores/ { spilled = $5 + $9 }
            /Used [0-9]+ registers/ {
                shared = 0
                if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
                if (verbose || spilled)
                    printf "sm_%s %-24s %3d registers, %5d bytes shared, %d bytes spilled\n", gpu, name, $5, shared, spilled
            }' "$said"
        ! awk '/spill stores/ && $5 + $9 > 64 { found = 1 } END { exit !found }' "$said" || spilling=1
    done
    echo "sm_$gpu: $count kernels assemble"
done
[ "$spilling" = 0 ] || { echo "more than 64 bytes of registers spilled" >&2; exit 1; }
