#!/usr/bin/env bash
# Puts NVIDIA's compiler (CUDA 13.0) into a folder, from the packages on PyPI: for machines without a
# CUDA toolkit, with or without a GPU. Needs python3 with pip, and gcc.
#   usage: tools/cuda/toolkit.sh FOLDER && source FOLDER/env.sh && cargo gpu
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
packages=(nvidia-nvvm nvidia-cublas)
packages+=(nvidia-cuda-{nvcc,crt,runtime,nvrtc,cccl})
python3 -m pip download --quiet --no-deps --dest "$folder/wheels" "${packages[@]/%/==13.0.*}" nvidia-curand
for wheel in "$folder"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$folder"
done
root=$folder/nvidia/cu13
chmod +x "$root"/bin/* "$root"/nvvm/bin/*
# Linkers ask for these by name, though the program opens them only when it runs.
mkdir -p "$root/lib64"
for library in cuda cublas cublasLt curand cusolver cusparse nvrtc cudnn nccl; do
    gcc -shared -x c /dev/null -o "$root/lib64/lib$library.so"
done
# The runtime that some of candle's kernels need becomes part of the program.
rm -f "$root"/lib/libcudart.so*
cp "$root"/lib/libcudart_static.a "$root"/lib/libcudadevrt.a "$root/lib64/"
echo 'INPUT(-l:libcudart_static.a -ldl -lrt -lpthread)' >"$root/lib64/libcudart.so"
cat >"$folder/env.sh" <<END
export CUDA_HOME=$root CUDA_PATH=$root CUDA_ROOT=$root CUDA_TOOLKIT_ROOT_DIR=$root
export PATH=$root/bin:\$PATH LIBRARY_PATH=$root/lib64 NVCC_APPEND_FLAGS="-I$root/include"
# The oldest GPUs that candle's kernels shall run on, times ten.
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-80}
END
echo "source $folder/env.sh"
