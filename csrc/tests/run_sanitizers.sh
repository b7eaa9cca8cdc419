#!/usr/bin/env bash
# Builds the CPU kernels and both extension modules with AddressSanitizer and UndefinedBehaviorSanitizer, and runs on
# them the C++ tests, then the tests of tensors that are changed under an optimizer. python3 on PATH must have torch,
# pybind11 and pytest: see `make sanitize`.
set -euo pipefail
cd "$(dirname "$0")/.."
export out
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

export CXX=${CXX:-g++}
export FLAGS="-O1 -g1 -std=c++17 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -Wall -Wextra -Wno-psabi
  -I. -pthread -fsanitize=address,undefined -fno-sanitize-recover=all"

# compile FLAGS SOURCE...: as many at once as there are processors, into objects such as $out/cpu.run.cpp.o
compile() {
  export more=$1
  shift
  # shellcheck disable=SC2016
  printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} sh -c \
    'echo "$CXX {}"; exec $CXX $FLAGS $more -c {} -o "$out/$(echo {} | tr / .).o"'
}

compile "" cpu/kernels_*.cpp $(ls cpu/*.cpp | grep -v kernels_) core/*.cpp tests/*.cpp
$CXX $FLAGS "$out"/{core,cpu}.*.o "$out/tests.test_core.cpp.o" -o "$out/test_core"
$CXX $FLAGS "$out"/{core,cpu}.*.o "$out/tests.test_ends.cpp.o" -o "$out/test_ends"
$CXX $FLAGS "$out"/{core,cpu}.*.o "$out/tests.test_threads.cpp.o" -o "$out/test_threads"
$CXX $FLAGS "$out/tests.test_fast_float.cpp.o" -o "$out/test_fast_float"
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "$out/test_core"
"$out/test_ends"
"$out/test_threads"
"$out/test_fast_float"

# The package beside its tests, with modules that check every access.
mkdir "$out/package"
cp -r ../rst_fused ../tests ../pyproject.toml "$out/package"
cp -r ../kernels "$out/package/rst_fused/kernels"
rm -f "$out"/package/rst_fused/*.so
ask() { python3 -c "import pybind11, sysconfig; from torch.utils import cpp_extension; print($1)"; }
version=$(sed -n 's/^TARGET_VERSION = "\(.*\)".*/\1/p' ../setup.py)
compile "-DTORCH_TARGET_VERSION=${version:?setup.py names no TARGET_VERSION} -DPy_LIMITED_API=0x030A0000
  -DTORCH_EXTENSION_NAME=_C $(ask '*(f"-isystem{path}" for path in cpp_extension.include_paths())')
  -isystem$(ask 'sysconfig.get_path("include")')" $(ls torch/*.cpp | grep -v ops_cuda)
compile "-DTORCH_EXTENSION_NAME=_plan_ext -isystem$(ask 'pybind11.get_include()')
  -isystem$(ask 'sysconfig.get_path("include")')" plan/*.cpp
$CXX $FLAGS -shared "$out"/{core,cpu,torch}.*.o -L"$(ask '*cpp_extension.library_paths()')" -lc10 -ltorch -ltorch_cpu \
  -o "$out/package/rst_fused/_C.abi3.so"
$CXX $FLAGS -shared "$out"/{core,plan}.*.o -o "$out/package/rst_fused/_plan_ext$(ask 'sysconfig.get_config_var("EXT_SUFFIX")')"

# Python and torch are not built for the sanitizer: it is loaded first, and what they leave at exit is no leak of ours.
cd "$out/package"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so)"
export LD_PRELOAD
# Without the modules the tests would be skipped, and without plans they would not get to them.
python3 -c "import torch, rst_fused, rst_fused._C, rst_fused._plan_ext as e; assert e.can_plan() and e.knows_impl_layout(), e"
python3 -m pytest -q -p no:cacheprovider tests/optim/test_memory_safety.py
python3 -m pytest -q -p no:cacheprovider tests/optim/test_many_tensors.py -k "moved and 259"
