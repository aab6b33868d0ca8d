#!/usr/bin/env bash
# What a machine with GPUs can show in at most 8 minutes: a sharded language model alone and in a federation, and the
# bare exchange. Without a GPU it does the same in a small form, in a few minutes.
#
#     benchmarks/gpu.sh          from a checkout; PYTHON names the Python with fl-adapters[hf] in it
#
# A line for each step says how long it took. The exit status is 1 if one failed. Two sites share all GPUs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
budget_s=480 failed=0
out=$(mktemp -d -t fl-adapters-gpu-XXXXXX)

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 1
ranks=$((gpus > 0 ? gpus : 2))
mib=$((gpus > 0 ? 256 : 8))

# step NAME COMMAND...: run it within what is left of the time, and say how long it took
step() {
  local log="$out/${1// /-}.log" name=$1 began=$SECONDS left=$((budget_s - SECONDS)) status=0
  shift
  if ((left < 20)); then
    printf '%-24s left out: the time is up\n' "$name"
    return
  fi
  timeout "$left" env -C "$out" "$@" > "$log" 2>&1 || status=$?
  if ((status == 0)); then
    printf '%-24s %4d s\n' "$name" $((SECONDS - began))
  else
    printf '%-24s %4d s, failed with status %d: %s\n' "$name" $((SECONDS - began)) "$status" "$log"
    failed=1
  fi
}

echo "$gpus GPUs; $ranks processes at each of two sites"
((gpus > 0)) && "$python" -c 'import torch; print(torch.cuda.get_device_name(), "with torch", torch.__version__)'
example=$PWD/examples/hf/llm_fsdp
simulate=("$python" -m fl_adapters simulate --sites 2 --rounds 2 -m torch.distributed.run -- --nproc-per-node "$ranks")
step "model alone" "$python" -m torch.distributed.run --nproc-per-node "$ranks" "$example/train.py"
step "model together" "${simulate[@]}" "$example/train_federated.py"
step "adapter together" "${simulate[@]}" "$example/train_federated.py" --lora
step "bare exchange" "$python" "$PWD/benchmarks/bare_exchange.py" --mib "$mib" --rounds 10 --repeats 1
echo "output in $out"
exit "$failed"
