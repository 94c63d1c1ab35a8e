#!/usr/bin/env bash
# Build horovod 0.28.1 with gloo for the torch of an environment, and install it there:
#
#   scripts/build_horovod.sh .venv/bin/python
#
# Its source asks for C++14, torch's headers for 17 and 20, so that `pip install horovod` fails; the
# standard is raised here. Wants cmake, make and a C++ compiler; takes 9 to 30 minutes on two cores.
# HOROVOD_GPU_OPERATIONS=NCCL in the environment builds for CUDA as well.
set -euo pipefail

python=${1:?usage: scripts/build_horovod.sh PYTHON}
version=0.28.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'import torch, setuptools, wheel, cffi, cloudpickle, psutil, yaml, packaging' || {
    echo "that environment needs torch, and: pip install setuptools wheel cffi cloudpickle psutil pyyaml packaging" >&2
    exit 1
}
for tool in cmake make c++; do
    command -v "$tool" > /dev/null || { echo "needs $tool" >&2; exit 1; }
done

# No isolation: it must be built against this very torch. `pip download` would build metadata first.
"$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation \
    --dest "$work" "horovod==$version"
tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
source="$work/horovod-$version"
sed -i -E 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$source/CMakeLists.txt"
sed -i -E 's/CMAKE_CXX_STANDARD 1[47]/CMAKE_CXX_STANDARD 20/' "$source/horovod/torch/CMakeLists.txt"
grep -q 'CMAKE_CXX_STANDARD 17' "$source/CMakeLists.txt"
grep -q 'CMAKE_CXX_STANDARD 20' "$source/horovod/torch/CMakeLists.txt"

# Old parts of its third-party code ask for a cmake older than newer ones accept.
export CMAKE_POLICY_VERSION_MINIMUM=3.5
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1
"$python" -m pip install --no-deps --no-build-isolation --no-cache-dir "$source"
"$python" -c 'import horovod.torch as hvd; assert hvd.gloo_built(); print("horovod is built")'
