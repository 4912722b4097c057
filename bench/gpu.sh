#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within ten minutes: tests, compute-sanitizer, benchmarks, a report.
#
#   bench/gpu.sh OUT_DIR          on a machine with a CUDA GPU
#   bench/gpu.sh OUT_DIR --toy    rehearsal of every part on a CPU, in Triton's interpreter, at toy size
#   bench/gpu.sh OUT_DIR --only "tests operators"    these parts alone ("more": 13B, OneVision, the largest batch; never by default)
#   bench/gpu.sh OUT_DIR --only end_to_end --config llava-next-7b   whole requests of one shape, B=32, 1 and 8, several lengths
#   bench/gpu.sh OUT_DIR --only end_to_end --config llava-next-7b --batch 32    all of the time for one batch: every length of every set-up
#   bench/gpu.sh OUT_DIR --only experiments          fourteen questions about the kernels, within eight minutes; never by default
#   bench/gpu.sh OUT_DIR --seconds 400               in less time: every part gets less (with --toy: all of it in so many seconds)
#
# Needs the package installed (pip install --no-deps --no-build-isolation -e .) and no network. PYTHON names the interpreter (python3).
# OUT_DIR gets report.md, report.json and one log a part; the logs of parts that do not run now stay as they are.
# A failing part does not stop the others; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  echo "usage: bench/gpu.sh OUT_DIR [--toy] [--only \"PART ...\"] [--config NAME [--batch B]] [--seconds N]" >&2
  exit 2
}
out="" toy="" only="" seconds="" config="" batch=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' bench/gpu.sh
      exit 0
      ;;
    --toy) toy=--toy ;;
    --only)
      [ -n "${2:-}" ] || usage
      only=$2
      shift
      ;;
    --config)
      case "${2:-}" in "" | -*) usage ;; esac
      config=$2
      shift
      ;;
    --batch)
      case "${2:-}" in "" | *[!0-9]*) usage ;; esac
      batch=$2
      shift
      ;;
    --seconds)
      case "${2:-}" in "" | *[!0-9]*) usage ;; esac
      seconds=$2
      shift
      ;;
    -*) usage ;;
    *) [ -z "$out" ] && out=$1 || usage ;;
  esac
  shift
done
known="environment tests kernels memcheck racecheck synccheck initcheck operators pytest end_to_end more experiments"
default="environment tests kernels memcheck racecheck synccheck initcheck operators pytest end_to_end"
[ -z "$toy" ] || default="$default experiments" # a rehearsal goes through them too
for name in $only; do
  case " $known " in *" $name "*) ;; *) echo "bench/gpu.sh: no part $name; parts: $known" >&2 && exit 2 ;; esac
done
only=${only:-$default}
wanted() { case " $only " in *" $1 "*) ;; *) false ;; esac; }
[ -n "$out" ] || usage
case "$out" in /*) ;; *) out=$OLDPWD/$out ;; esac
mkdir -p "$out" || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$out"/report.md "$out"/report.json
if wanted experiments; then rm -f "$out"/experiments.md "$out"/experiments.json; fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
whole=585
[ -n "$toy" ] || whole=${seconds:-$whole}
total=$whole # seconds for everything
of() { echo $(($1 * whole / 585)); } # of SECONDS: what a part that has so many of 585 gets
if [ -n "$toy" ]; then
  export TRITON_INTERPRET=1 DYRATE_GPU_TESTS_ON_CPU=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
  total=${seconds:-1800} # a rehearsal's parts are as slow as the machine: less time in all makes none of them quicker
fi

if ! "$python" -c 'import dyrate_kernels.ops' 2>"$work/import"; then
  tail -3 "$work/import" >&2
  echo "bench/gpu.sh: $python cannot import dyrate_kernels; pip install --no-deps --no-build-isolation -e ." >&2
  exit 2
fi

failed=0
# part NAME LOG BUDGET COMMAND...: runs it with what time there is, its output goes to OUT_DIR/LOG (appended: parts may share one).
# Exit status 75 says that there was nothing to do on this machine.
part() {
  local name=$1 log=$2 budget=$3 start=$SECONDS status=ok
  wanted "$name" || return 0
  shift 3
  local left=$((total - 12 - SECONDS))
  [ "$budget" -le "$left" ] || budget=$left
  if [ "$budget" -lt 5 ]; then
    status="failed: no time left"
    echo "no time left" >>"$out/$log"
  else
    echo "== $name (at most ${budget}s): $*" >>"$out/$log"
    timeout -k 5 "$budget" "$@" >>"$out/$log" 2>&1 </dev/null
    case $? in
      0) ;;
      75) status="skipped: $(tail -1 "$out/$log")" ;;
      124 | 137) status="failed: stopped after ${budget}s" ;;
      *) status=failed ;;
    esac
  fi
  case "$status" in failed*) failed=1 ;; esac
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" "$budget" "$log" >>"$work/parts.tsv"
  printf '%-14s %-40s %4ss\n' "$name" "$status" "$((SECONDS - start))"
}

sanitizer() { # sanitizer TOOL: bench/sanitize.py under compute-sanitizer
  local tool=$1 found candidate
  found=$(command -v compute-sanitizer || true)
  for candidate in /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer; do
    [ -n "$found" ] || { [ -x "$candidate" ] && found=$candidate; }
  done
  if [ -n "$toy" ] || [ -z "$found" ]; then
    if [ -n "$toy" ]; then echo "a rehearsal has no device to check"; else echo "compute-sanitizer is not installed"; fi
    return 75
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 9 --report-api-errors no --print-limit 20 \
    "$python" -m bench.sanitize >"$work/$tool" 2>&1
  local status=$?
  cat "$work/$tool"
  if grep -q "Device not supported" "$work/$tool"; then
    echo "compute-sanitizer does not support this device"
    return 75
  fi
  return $status
}
export -f sanitizer
export python toy work

for name in $only; do # parts that run now start their logs anew
  case "$name" in
    kernels | *check) : >"$out/sanitizer.log" ;;
    more) : >"$out/end_to_end.log" ;;
    *) : >"$out/$name.log" ;;
  esac
done
part environment environment.log $([ -n "$toy" ] && echo 60 || of 30) "$python" -m bench.report environment $toy
ran='"$@" | tee "$work/tests"; status=${PIPESTATUS[0]}; grep -q " passed" "$work/tests" || { echo "no test ran"; exit 1; }; exit $status'
pytest=("$python" -m pytest tests/gpu tests/ops tests/patching/graph -m gpu -q -p no:cacheprovider --maxfail=40)
if [ -n "$toy" ]; then
  part tests tests.log 600 bash -c "$ran" _ "${pytest[@]}" -k "test_shapes or test_select_tokens_of_rows or test_compact or test_reorder or test_captured or test_llava_7b"
else
  if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n "$(nproc | awk '{ print ($1 < 12) ? $1 : 12 }')"); fi
  # meanwhile the kernels of the benchmarks are built: compiling them is most of that part's time
  compiling=""
  if wanted operators; then
    timeout -k 5 "$(of 180)" "$python" -m bench.operators --compile >"$work/compile" 2>&1 </dev/null &
    compiling=$!
  fi
  part tests tests.log "$(of 200)" env OMP_NUM_THREADS=1 bash -c "$ran" _ "${pytest[@]}"
  if [ -n "$compiling" ]; then
    wait "$compiling" || true # a kernel that does not build fails again, with its row, in the benchmarks
    cat "$work/compile" >>"$out/operators.log"
  fi
fi
part kernels sanitizer.log $([ -n "$toy" ] && echo 300 || of 45) "$python" -m bench.sanitize
part memcheck sanitizer.log "$(of 55)" bash -c 'sanitizer memcheck'
part racecheck sanitizer.log "$(of 55)" bash -c 'sanitizer racecheck'
part synccheck sanitizer.log "$(of 35)" bash -c 'sanitizer synccheck'
part initcheck sanitizer.log "$(of 35)" bash -c 'sanitizer initcheck'
part operators operators.log $([ -n "$toy" ] && echo 300 || of 120) "$python" -m bench.operators "$work/operators.json" $toy \
  --seconds $([ -n "$toy" ] && echo 280 || of 105)
few=$([ -n "$toy" ] && echo "" || echo "B32-N2880 or B1-N576")
part pytest pytest.log $([ -n "$toy" ] && echo 200 || of 70) "$python" -m pytest bench -q -p no:cacheprovider -k "$few" --benchmark-json="$out/benchmark.json"
requests=130 inner=100 # of 585 seconds
if [ -n "$config" ]; then requests=570 inner=530; fi
part end_to_end end_to_end.log $([ -n "$toy" ] && echo 950 || of $requests) "$python" -m bench.end_to_end "$work/end_to_end.json" $toy \
  ${config:+--config "$config"} ${batch:+--batch "$batch"} --seconds $([ -n "$toy" ] && echo 900 || of $inner)
# only where it is asked for: other models, and the largest batch that fits
e2e() { "$python" -m dyrate_kernels.cli.main bench e2e --rounds 1 "${@:2}" --out "$work/more-$1.json"; }
more() {
  if [ -n "$toy" ]; then
    e2e a --config toy --max-new-tokens 8 --largest-batch && e2e b --config toy-onevision --max-new-tokens 8
  else
    e2e a --config llava-1.5-7b --batch 1 8 32 --largest-batch && e2e b --config llava-1.5-13b --batch 1 32 && e2e c --config llava-onevision-7b --batch 1 8
  fi
}
export -f e2e more
part more end_to_end.log $([ -n "$toy" ] && echo 200 || of 500) bash -c more
part experiments experiments.log $([ -n "$toy" ] && echo 400 || of 480) "$python" -m bench.experiments "$out" $toy \
  --seconds $([ -n "$toy" ] && echo 390 || of 465)

if "$python" -m bench.report write "$out" --parts "$work/parts.tsv" --rows "$work/operators.json" "$work/end_to_end.json" \
  "$work"/more-*.json "$out/experiments.json"; then
  echo "report: $out/report.md (${SECONDS}s in all)"
  sed -n '/^## Targets/,/^## Speed-ups/p' "$out/report.md" | sed '$d'
else
  failed=1
fi
if wanted experiments && [ -f "$out/experiments.md" ]; then
  echo "experiments: $out/experiments.md"
  sed -n '/^## What each took/,$p' "$out/experiments.md"
fi
exit $failed
