#!/usr/bin/env bash
# All that waits for a GPU, in one command: the lines that results/README.md calls pending.
#
#   bash results/gpu.sh              # ten minutes of a GPU; MINUTES=20 bash results/gpu.sh gives more
#   bash results/gpu.sh --dry        # each part in miniature, on any machine: no typo waits for the card
#
# Each part is bounded in time and writes results/gpu/<part>.txt (--dry: results/gpu-dry). A part that
# has run at this commit is not run again: a second call goes on with the others. PARTS="kernels
# decoding" runs these alone. A table of what ran, and how long it took, comes last; the exit code is 0
# only if every part ran.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
if [ "${1:-}" = --dry ]; then dry=1; else dry=; fi
out=${OUT:-$root/results/gpu${dry:+-dry}}
minutes=10
[ -n "$dry" ] && minutes=60
end=$((SECONDS + 60 * ${MINUTES:-$minutes}))
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
mkdir -p "$out"
export PYTHONPATH=$root
table=()
failed=0

# part NAME SECONDS COMMAND...: what NAME=cut at its end may be stopped there, and has run all the same
part() {
    local name=${1%=cut} cut=$1 limit=$2 start=$SECONDS code last
    shift 2
    [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]] && return
    [ $((end - SECONDS)) -lt "$limit" ] && limit=$((end - SECONDS))
    if [ "$(cat "$out/$name.done" 2>/dev/null)" = "$commit" ]; then
        table+=("$name|ran before|")
        return
    fi
    if [ "$limit" -lt 1 ]; then
        table+=("$name|no time left|")
        failed=1
        return
    fi
    echo "== $name, at most $limit s: $*"
    (cd "$work" && timeout -k 30 "$limit" "$@") > "$out/$name.txt" 2>&1
    code=$?
    tail -n 12 "$out/$name.txt"
    last=$(tr '\r' '\n' < "$out/$name.txt" | grep -v '^ *$' | tail -n 1 | cut -c1-90)
    if [ "$code" = 0 ] || { [ "$code" = 124 ] && [ "$cut" != "$name" ]; }; then
        echo "$commit" > "$out/$name.done"
        table+=("$name|$((SECONDS - start)) s|$last")
    else
        table+=("$name|FAILED ($code) after $((SECONDS - start)) s|$last")
        failed=1
    fi
}

work=$root
python - > "$out/machine.txt" 2>&1 <<'PYTHON'
import platform, torch, transformers
from ssd_kernel import triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(gpu, "| python", platform.python_version(), "| torch", torch.__version__, "| triton",
      triton and triton.__version__, "| transformers", transformers.__version__)
PYTHON
echo "commit $commit" >> "$out/machine.txt"
cat "$out/machine.txt"

if [ -z "$dry" ]; then
    if ! grep -q "^[A-Z].*|" "$out/machine.txt" || grep -q "^no GPU" "$out/machine.txt"; then
        echo "no CUDA device here: --dry runs every part in miniature" >&2
        exit 1
    fi
    device_tests="triton or kernel or softmax or orientation or distillation_loss or see_through"
    part tests 150 python -m pytest -q test_ssd.py -k "$device_tests"
    part kernels 130 python -m extras.bench_kernel --json "$out/kernels.json"
    part phi-bench 90 python -m extras.cost --preset phi --bench
    part phi-bench-compile 120 python -m extras.cost --preset phi --bench --compile
    part decoding 90 python eval.py --speed --random microsoft/phi-1_5 --contexts 512 8192 --batch_sizes 1 32
    part smollm2=cut 1200 python distill.py --preset smollm2 --data "${TEXTS:-stdlib}" --tokens 2e6 8e6 30e6 \
        --batch 8192 8192 16384 --context 1024 --micro_batch 8 --save_minutes 1 --out "$out/smollm2"
else
    part tests 300 python -m pytest -q test_ssd.py -k "one_step_in_one_kernel or see_through"
    part kernels 300 python -m extras.bench_kernel --lengths 16 --orientation_lengths 16 --tokens 16 \
        --vocabulary 64 --json "$out/kernels.json"
    part tiny-bench 300 python -m extras.cost --preset tiny --bench --context 32 --batch 32
    part tiny-bench-compile 300 python -m extras.cost --preset tiny --bench --compile --context 32 --batch 32
    part decoding 300 python eval.py --speed --random tiny --contexts 16 32 --batch_sizes 1 2
    work=$(mktemp -d)               # its tiny teacher is of no use to anybody
    part run=cut 300 python "$root/distill.py" --preset tiny --teacher_tokens 4096 --tokens 12288 \
        --eval_tokens 512 --save_minutes 1
    rm -r "$work"
fi

printf '\n%-22s %-26s %s\n' part took 'last line'
for row in "${table[@]}"; do
    IFS='|' read -r name took last <<< "$row"
    printf '%-22s %-26s %s\n' "$name" "$took" "$last"
done
exit $failed
