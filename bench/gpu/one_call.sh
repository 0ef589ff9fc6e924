#!/usr/bin/env bash
# Everything that needs a GPU, in one call and inside a time limit, most important first.
#
#   bash bench/gpu/one_call.sh OUT_DIR [--limit-s 540] [--stages probe,selfcheck,kernels,core,h2o,more,levers,peers] [--rehearse]
#
# Without --stages: all of them, peers only where TRTKIT_PEERS names the folder of their wheels.
# Needs python3 with torch and triton on a CUDA machine, nothing installed from this project. Each stage gets a share of
# what time is left and is ended when it is over; records are written as they come, so a killed call leaves what was done.
# OUT_DIR gets at most eight flat files: probe.json selfcheck.json kernels.json llama70b.json h2o.json peers.json
# summary.txt one_call.log. --rehearse runs the same stages on a CPU with tiny shapes and gives no rates.
# TRITON_CACHE_DIR=FOLDER keeps compiled kernels there for the next call; one that cannot be written is told and not used.
# Exit: 0 if INT8's first cell is there, or, without the core stage, every asked stage's record; 1 otherwise.
set -u -o pipefail
SECONDS=0

usage() { sed -n '4p' "$0" | cut -c3- >&2; exit 2; }

out="" limit_s=540 rehearse="" stages=""
while [ $# -gt 0 ]; do
  case "$1" in
    --limit-s) [ $# -ge 2 ] || usage; limit_s="$2"; shift 2 ;;
    --stages) [ $# -ge 2 ] || usage; stages="$2"; shift 2 ;;
    --rehearse) rehearse="--rehearse"; shift ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out="$1"; shift ;;
  esac
done
[ -n "$out" ] || usage
if [ -z "$stages" ]; then
  stages="probe,selfcheck,kernels,core,h2o,more,levers"
  # Peers come after our own rows, and by themselves only where their wheels were brought.
  if [ -n "${TRTKIT_PEERS:-}" ] || [ -n "$rehearse" ]; then stages="$stages,peers"; fi
fi
case "$limit_s" in "" | *[!0-9]*) echo "one_call.sh: --limit-s is '$limit_s', expected whole seconds" >&2; exit 2 ;; esac

# How the time left is shared among the stages still to come.
weight_of() {
  case "$1" in
    probe) echo 9 ;; selfcheck) echo 11 ;; kernels) echo 10 ;; core) echo 42 ;; h2o) echo 18 ;; more) echo 20 ;;
    levers) echo 20 ;; peers) echo 12 ;; *) echo 0 ;;
  esac
}
IFS=, read -r -a asked <<<"$stages"
for stage in "${asked[@]}"; do
  [ "$(weight_of "$stage")" -gt 0 ] || { echo "one_call.sh: unknown stage '$stage'" >&2; exit 2; }
done

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
log="$out/one_call.log"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# The shell's own list of jobs: a signal may come before a job's id could be kept in a variable.
end_children() {
  for job in $(jobs -p); do kill -TERM "$job" 2>/dev/null; done
  wait
}
finish() {
  # What sends one signal often sends a second, to everybody; the table and the log are written all the same.
  trap '' TERM INT HUP
  end_children
  [ -z "$running" ] || ended="$ended $running ended by a signal;"
  rm -f "$out"/.*.json.*.tmp  # of a writer that was killed
  timeout --kill-after=5 60 python3 "$here/summary.py" "$out" --stages "$stages" >"$out/summary.txt"
  status=$?
  # Every derived number again from the raw samples, by other arithmetic.
  timeout --kill-after=5 60 python3 "$here/recompute.py" "$out" >"$scratch/recomputed" 2>&1
  echo "== recompute: exit $?" | tee -a "$log"
  tail -n 40 "$scratch/recomputed" >>"$log"
  { tail -n 1 "$scratch/recomputed"; echo "stages, exit codes:$ended (124 and 137: its time was over; what it had done is kept)"; } >>"$out/summary.txt"
  cat "$out/summary.txt"
  exit "$status"
}
ended="" running=""
trap finish TERM INT HUP
: >"$log"

PYTHONPATH="$(python3 "$here/sources.py" "$scratch/path")" || exit 2
export PYTHONPATH
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A rehearsal's products are tiny; more threads only wait for each other.
[ -z "$rehearse" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Compiled kernels serve the later stages; a folder given by whoever calls serves the next call on this machine as well.
writable() { mkdir -p "$1" 2>/dev/null && probe="$(mktemp -p "$1" 2>/dev/null)" && rm -f "$probe"; }
if [ -n "${TRITON_CACHE_DIR:-}" ] && ! writable "$TRITON_CACHE_DIR"; then
  echo "== TRITON_CACHE_DIR: '$TRITON_CACHE_DIR' cannot be written; compiled kernels go to a temporary folder" | tee -a "$log"
  TRITON_CACHE_DIR=""
fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"

command_of() {
  case "$1" in
    probe) command=("$here/probe.py" --out "$out/probe.json") ;;
    selfcheck) command=("$here/selfcheck.py" --out "$out/selfcheck.json") ;;
    kernels) command=("$here/kernels.py" --out "$out/kernels.json") ;;
    core) command=("$here/llama70b.py" --out "$out" --probe "$out/probe.json" --stage core) ;;
    h2o) command=("$here/h2o.py" --out "$out/h2o.json") ;;
    more) command=("$here/llama70b.py" --out "$out" --probe "$out/probe.json" --stage more) ;;
    levers) command=("$here/llama70b.py" --out "$out" --probe "$out/probe.json" --stage levers) ;;
    peers) command=("$here/peers/run.py" --out "$out/peers.json") ;;
  esac
}

# run SECONDS COMMAND...: into the log; `wait` is what a signal may interrupt.
run() {
  timeout --signal=TERM --kill-after=8 "$@" >>"$log" 2>&1 &
  wait "$!"
}

# On a fresh machine the first import reads gigabytes from a slow disk. All stages share that time, not the first alone.
warming='import torch, triton; torch.cuda.is_available() and torch.zeros(1, device="cuda")'
run "$((limit_s / 4 + 1))" python3 -c "$warming" || echo "== imports: exit $?" | tee -a "$log"
echo "== imports: $SECONDS s" | tee -a "$log"
for index in "${!asked[@]}"; do
  stage="${asked[$index]}"
  total=0
  for later in "${asked[@]:$index}"; do total=$((total + $(weight_of "$later"))); done
  left=$((limit_s - SECONDS - 5))
  share=$((left * $(weight_of "$stage") / total))
  if [ "$share" -lt 5 ]; then
    echo "== $stage: not begun, $left s left" | tee -a "$log"
    ended="$ended $stage not begun;"
    continue
  fi
  echo "== $stage: at most $share s" | tee -a "$log"
  began=$SECONDS
  running="$stage"
  inner=$((share > 20 ? share - 8 : share))
  command_of "$stage"
  run "$share" python3 "${command[@]}" --time-limit-s "$inner" $rehearse
  status=$?
  running=""
  # What was ended by force may hold its memory on the card for a moment longer.
  if [ "$status" -ge 124 ]; then sleep 3; fi
  echo "== $stage: exit $status after $((SECONDS - began)) s" | tee -a "$log"
  ended="$ended $stage $status;"
  if [ "$stage" = selfcheck ]; then
    # A kernel that takes the CUDA context with it would take every later stage too.
    fatal="$(python3 "$here/selfcheck.py" --fatal "$out/selfcheck.json" 2>>"$log")"
    if [ -n "$fatal" ]; then
      export TRTKIT_KERNELS_OFF="${TRTKIT_KERNELS_OFF:+$TRTKIT_KERNELS_OFF,}$fatal"
      echo "== switched off: $TRTKIT_KERNELS_OFF" | tee -a "$log"
    fi
  fi
done
finish
