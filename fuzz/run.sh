#!/usr/bin/env bash
# Fuzzes every target of tests/fuzz with libFuzzer, or those that are named, and ends with one line for each.
#
#   fuzz/run.sh SECONDS [TARGET...]     SECONDS for each
#
# New inputs are kept in target/fuzz/corpus; what is worth keeping in git goes to tests/fuzz/corpus by `fuzz/run.sh keep`.
# Needs a C++ compiler for libFuzzer itself. Coverage is LLVM's, which the stable compiler has; there is no address sanitizer.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:?how many seconds for each target?}
shift
cargo=${CARGO:-cargo}
triple=x86_64-unknown-linux-gnu
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
coverage+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
RUSTFLAGS="--cfg fuzzing $coverage" $cargo build --manifest-path fuzz/Cargo.toml --release --locked --target $triple \
    --target-dir target/fuzz || exit
fuzz=target/fuzz/$triple/release/limosa-fuzz

if (($# == 0)); then
    mapfile -t targets < <(ls tests/fuzz/corpus)
else
    targets=("$@")
fi

if [[ $seconds == keep ]]; then
    for target in "${targets[@]}"; do
        work=target/fuzz/corpus/$target
        [[ -d $work ]] || continue
        LIMOSA_FUZZ_TARGET=$target $fuzz -merge=1 -max_len=1024 "tests/fuzz/corpus/$target" "$work" >"$work.log" 2>&1 || exit
        echo "$target: $(ls "tests/fuzz/corpus/$target" | wc -l) inputs kept"
    done
    exit
fi

status=0
summary=()
for target in "${targets[@]}"; do
    work=target/fuzz/corpus/$target
    found=target/fuzz/found/$target
    mkdir -p "$work" "$found"
    echo "fuzz: $target for $seconds s"
    # A hang is a fault too: no target takes a tenth of that.
    LIMOSA_FUZZ_TARGET=$target $fuzz -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="$found/" "$work" "tests/fuzz/corpus/$target" >"$work.log" 2>&1
    result=$?
    runs=$(awk '/^stat::number_of_executed_units:/ { print $2 }' "$work.log")
    crashes=$(find "$found" -type f | wc -l)
    summary+=("$target: ${runs:-0} executions, $(ls "$work" | wc -l) new inputs, $crashes crashes")
    if ((result != 0)); then
        status=1
        grep -aE "panicked at|ERROR: libFuzzer|Test unit written" -A 2 "$work.log" | head -20
        summary+=("  its log is $work.log, its inputs are in $found")
    fi
done
printf '%s\n' "${summary[@]}"
exit $status
