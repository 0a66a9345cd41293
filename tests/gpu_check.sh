#!/usr/bin/env bash
# What only a GPU can tell, in under five minutes: does it work, is it right, how fast is it?
#
#   tests/gpu_check.sh                    # on a machine with a GPU
#   tests/gpu_check.sh --wheels DIR       # with the wheels in DIR, where packages are missing and no index is reached
#   tests/gpu_check.sh --device cpu       # every part at its smallest sizes, to check this script
#   tests/gpu_check.sh --parts "bench profile"
#
# Parts, one after the other, each under a time limit of its own: pytest (the tests that need a GPU), bench (batch 16
# and 64, 256 px, config f), profile (by kernel; with and without CUDA graphs), graphs (the same losses with and
# without), furballs (a minute of training at 128 px, samples, mask IoU), loaders (1, 2 and 16 threads).
#
# A part that fails does not keep the others from running; the exit code is then 1. One that lacks a package is skipped.
# Everything that is printed is in check.log, beside bench.json, profile.json, profile.txt and grid.png: in --out DIR,
# by default $OUT or else a new temporary directory. Takes $PYTHON, or the first of python and python3 that has torch.
set -u

PARTS="pytest bench profile graphs furballs loaders"
TOTAL_S=295

usage() {
    sed -n 's/^# \{0,1\}//p; /^set/q' "$0" | sed 1d
}

fail() {
    echo "error: $1" >&2
    exit 2
}

device=cuda wheels="" out="${OUT:-}" parts="$PARTS"
while [ $# -gt 0 ]; do
    case "$1" in
        --help) usage; exit 0 ;;
        --device | --wheels | --out | --parts) [ $# -gt 1 ] || fail "$1 needs a value" ;;&
        --device) device="$2" ;;
        --wheels) wheels="$2" ;;
        --out) out="$2" ;;
        --parts) parts="$2" ;;
        *) fail "$1 is unknown: see tests/gpu_check.sh --help" ;;
    esac
    shift 2
done
case "$device" in cpu | cuda) ;; *) fail "--device $device is unknown: give cpu or cuda" ;; esac
for part in $parts; do
    [[ " $PARTS " == *" $part "* ]] || fail "part $part is unknown: choose from $PARTS"
done
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || fail "--wheels $wheels is not a directory"
    wheels="$(cd "$wheels" && pwd)"
fi
[ -n "$out" ] || out="$(mktemp -d)"
mkdir -p "$out" || fail "--out $out cannot be made"
out="$(cd "$out" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=""
for candidate in ${PYTHON:-python python3}; do
    if "$candidate" -c "import torch" 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || fail "no Python with torch: activate its environment, or give PYTHON=..."

work="$(mktemp -d)"
running=""
trap 'rm -rf "$work"' EXIT
trap '[ -z "$running" ] || kill "$running" 2>/dev/null; exit 130' INT TERM

# All that is printed goes to the screen and to the log.
exec 3>&1 4>&2
exec > >(tee "$out/check.log") 2>&1
logger=$!

site="$work/site"
mkdir "$site"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    if "$python" -m pip --version >/dev/null 2>&1; then
        install=("$python" -m pip install --quiet)
    else
        install=(uv pip install --quiet --python "$python")
    fi
    for wheel in "$wheels"/*.whl; do
        "${install[@]}" --no-index --no-deps --target "$site" "$wheel" || echo "not installed: $(basename "$wheel")"
    done
fi

summary=() failed=0 start=$SECONDS

# part NAME LIMIT_S FILE COMMAND...: print what the command prints, also to the file, and note how it ended.
part() {
    local name="$1" limit="$2" file="$3" begin=$SECONDS code=124 copier
    shift 3
    if [ "$device" = cuda ] && [ $((start + TOTAL_S - SECONDS)) -lt "$limit" ]; then
        limit=$((start + TOTAL_S - SECONDS))
    fi
    printf '\n=== %s: at most %d s\n$ %s\n' "$name" "$limit" "$*"
    if [ "$limit" -gt 0 ]; then
        exec 5> >(tee "$file")
        copier=$!
        timeout --kill-after=10 "$limit" "$@" >&5 2>&1 5>&- &
        running=$!
        wait "$running"
        code=$?
        running=""
        exec 5>&-
        wait "$copier"
    fi
    case "$code" in
        0) end_part "$name" "passed in $((SECONDS - begin)) s" ;;
        124) end_part "$name" "FAILED: not done in $limit s" ;;
        *) end_part "$name" "FAILED with exit code $code after $((SECONDS - begin)) s" ;;
    esac
    [ "$code" -eq 0 ] || failed=1
}

end_part() {
    summary+=("$1: $2")
    echo "=== $1: $2"
}

# lacks NAME MODULE...: whether a module cannot be imported; the part NAME is then skipped.
lacks() {
    local name="$1" package
    shift
    package="$("$python" tests/gpu_parts.py missing "$@")" || return 1 # another error: the part itself shows it
    [ -n "$package" ] || return 1
    end_part "$name" "skipped: $package is not installed (--wheels DIR installs wheels)"
}

run_pytest() {
    local files
    mapfile -t files < <("$python" tests/gpu_parts.py tests)
    if [ "${#files[@]}" -eq 0 ]; then
        end_part pytest "skipped: no file with such tests can be imported"
    else
        part pytest "$1" /dev/null "$python" -m pytest -o addopts= -v -m gpu -rsfE -p no:cacheprovider "${files[@]}"
    fi
}

run_loaders() {
    local threads sizes=("$@")
    lacks loaders data_shards.bench webdataset && return
    for threads in "${loader_threads[@]}"; do
        part "loaders, $threads threads" "$loader_limit" /dev/null \
            "$python" data_shards/bench.py --threads "$threads" --cache-dir "$work/shards" "${sizes[@]}"
    done
}

bench=("$python" pipeline/bench.py --device "$device" --no-reference --precision bf16)
if [ "$device" = cuda ]; then
    limits=(75 90 60 40 100)
    bench+=(--dataset ffhq)
    batches=(16 64) profile=(--batch 16 --no-graphs) training=(--seconds 60)
    loader_threads=(16 1 2) loader_limit=40 loader_sizes=(--repetitions 2 --batches 10)
else
    limits=(600 600 600 600 600)
    bench+=(--repetitions 1)
    batches=(4 8) profile=(--batch 4) training=(--seconds 5 --num-images 64)
    loader_threads=(1 2) loader_limit=600
    loader_sizes=(--resolution 32 --num-images 64 --batch 8 --repetitions 1 --batches 2)
fi

"$python" tests/gpu_parts.py versions
for each in $parts; do
    case "$each" in
        pytest) run_pytest "${limits[0]}" ;;
        bench) part bench "${limits[1]}" /dev/null "${bench[@]}" --batch "${batches[@]}" --json "$out/bench.json" ;;
        profile)
            part profile "${limits[2]}" "$out/profile.txt" \
                "${bench[@]}" "${profile[@]}" --profile --json "$out/profile.json"
            ;;
        graphs) part graphs "${limits[3]}" /dev/null "$python" tests/gpu_parts.py graphs --device "$device" ;;
        furballs)
            lacks furballs data_shards.sources.furballs data_shards.parallel pipeline.generation.sample_grid pipeline.evaluation.segmenter ||
                part furballs "${limits[4]}" /dev/null \
                    "$python" tests/gpu_parts.py furballs --device "$device" --out "$out/grid.png" "${training[@]}"
            ;;
        loaders) run_loaders "${loader_sizes[@]}" ;;
    esac
done

printf '\n%s\n' "in $((SECONDS - start)) s, files in $out:"
printf '%s\n' "${summary[@]}"
exec >&3 2>&4
wait "$logger"
exit "$failed"
