#!/usr/bin/env bash
# Builds the core with AddressSanitizer and UndefinedBehaviorSanitizer and runs its C++ tests. No torch needed.
set -eu
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-O1 -g -std=c++17 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -I. -pthread"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all"
for source in core/*.cpp cpu/*.cpp tests/test_core.cpp; do
  echo "${CXX:-g++} $source"
  ${CXX:-g++} $flags -c "$source" -o "$out/$(basename "$source").o"
done
${CXX:-g++} $flags "$out"/*.o -o "$out/test_core"
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "$out/test_core"
