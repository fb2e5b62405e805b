#!/usr/bin/env bash
# The whole product in six minutes on two CPU cores: real conversations -> shards -> DeepSpeed training -> evaluation ->
# exported model -> loss curve and a few replies. Every command is printed before it runs, to be copied and changed.
#
#   bash launch/demo.sh            output goes to demo_output/ (removed first)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

bash launch/make_venv.sh demo
export PATH="$PWD/.venv/bin:$PATH"
out=demo_output

show() {
  printf '\n$'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=-]+$ ]]; then printf ' %s' "$word"; else printf ' "%s"' "$word"; fi
  done
  printf '\n'
  "$@"
}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  processes=$gpus config=ds_configs/zero1_fp16.json
else
  # DeepSpeed's launcher would find the same, and warn about it.
  export DS_ACCELERATOR=cpu
  processes=2
  # On a CPU without instructions for bf16 it is slower than fp32, up to fifty times: measure both.
  config=$(python -c 'import sys
from dialogpt_ds.matmul import cpu_rates
from dialogpt_ds.hardware import bf16_is_fast
print("a matrix product on one core of this CPU:", cpu_rates(), file=sys.stderr)
print("ds_configs/cpu_bf16.json" if bf16_is_fast() else "ds_configs/cpu_fp32.json")')
fi
# Budgeted in tokens: 8 rows of 128 a step, whatever the number of processes, as far as it divides.
rows=$((8 / processes > 0 ? 8 / processes : 1))

rm -rf "$out"
echo "installed after $((SECONDS - started)) s; training on $processes process(es), $([ "$gpus" -gt 0 ] && echo GPU || echo CPU)"

show python preprocess/make_shards.py --format chitchat --output "$out/shards" \
  --validation_fraction 0.01

show deepspeed --num_gpus "$processes" launch/train.py --model small \
  --train_input_file "$out/shards/train" --eval_input_file "$out/shards/validation" \
  --deepspeed_config "$config" --train_batch_size "$rows" --gradient_accumulation_steps 1 --valid_batch_size 8 \
  --num_optim_steps 300 --valid_step 75 --save_step 300 \
  --lr_schedule cosine --learning_rate 1e-3 --warmup_steps 40 \
  --output_dir "$out/run"

show python launch/plot.py "$out/run" --output "$out/curves.png"

show python launch/replies.py --model "$out/run/model" \
  --prompt "Hello, how are you?" "What do you do for fun?" "I watched a movie yesterday."

echo "done in $((SECONDS - started)) s: model in $out/run/model, curves in $out/curves.png"
