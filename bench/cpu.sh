#!/usr/bin/env bash
# The record of a CPU, in one command and about a quarter of an hour: whole models, the host's work in a step, the microbenchmarks, a report.
#
#   bench/cpu.sh OUT_DIR
#
# Needs the package installed. PYTHON names the interpreter (python3). One thread; ratios are what counts, seconds are this machine's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# = 1 ] || { echo "usage: bench/cpu.sh OUT_DIR" >&2 && exit 2; }
case "$1" in /*) out=$1 ;; *) out=$OLDPWD/$1 ;; esac
mkdir -p "$out"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore

"$python" -m bench.host_time | tee "$out/host_time.txt"
"$python" -m bench.launch_overhead | tee "$out/launch_overhead.txt"
"$python" -m dyrate_kernels.cli.main bench e2e --config bundled --batch 1 4 --max-new-tokens 32 --rounds 5 --out "$work/bundled.json"
"$python" -m dyrate_kernels.cli.main bench e2e --config small --batch 1 4 --max-new-tokens 24 --rounds 3 --out "$work/small.json"
"$python" -m pytest bench -q -p no:cacheprovider --benchmark-json="$out/benchmark.json"
"$python" -m bench.report write "$out" --parts "$work/none" --rows "$work/bundled.json" "$work/small.json"
"$python" -m bench.report tables "$out"
