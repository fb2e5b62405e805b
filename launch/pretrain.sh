#!/usr/bin/env bash
# The part that run_117M.sh, run_345M.sh and run_762M.sh share; they say what it needs and how long it takes.
#
#   bash launch/run_117M.sh [OPTION...]      options of launch/train.py, which go before those of here
#
# Variables:
#   DATA     folder with train and validation, as make_shards.py writes with --max_seq_length 512   (shards)
#   GPUS     GPUs in all, a divisor of 8 or a multiple of it   (8). Up to 8 the global batch is the same; with more it grows, and the number
#            of steps falls as much, so that the epochs are the same
#   HOSTS    host file for more than one machine   (none: this one)
#   CONFIG   DeepSpeed configuration   (ds_configs/zero1_fp16.json; on A100 and later ds_configs/zero1_bf16.json)
#   OUTPUT   folder of the run   (models/SIZE)
#
# To stop: touch OUTPUT/STOP, or Ctrl-C; to go on: the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/card.sh
. launch/card.sh

# pretrain SIZE ROWS STEPS [OPTION...]: ROWS of 512 tokens for each of 8 GPUs and optimizer step
pretrain() {
  local size=$1 rows=$2 steps=$3
  shift 3
  local gpus=${GPUS:-8} data=${DATA:-shards} accumulation=1
  if ((gpus < 1 || (8 % gpus != 0 && gpus % 8 != 0))); then
    echo "error: GPUS=$gpus: give 1, 2, 4, 8 or a multiple of 8" >&2
    exit 2
  fi
  if ((gpus < 8)); then
    accumulation=$((8 / gpus))
    rows=$((rows * accumulation))
  else
    steps=$((steps * 8 / gpus))
  fi
  # Larger micro-batches where the cards have room for them: the same step in fewer pieces, which keep a fast GPU busier.
  local fit
  fit=$(card_factor)
  while ((accumulation > 1 && fit > 1)); do
    accumulation=$((accumulation / 2)) fit=$((fit / 2))
  done
  local launcher=(deepspeed --num_gpus "$gpus")
  if [ -n "${HOSTS:-}" ]; then
    # Without it the deepspeed command waits for hours for a host whose link is gone.
    export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    launcher=(deepspeed --hostfile "$HOSTS")
  fi
  set -x
  exec "${launcher[@]}" launch/train.py --model "$size" --expect_world_size "$gpus" \
    --train_input_file "$data/train" --eval_input_file "$data/validation" --max_seq_length 512 \
    --deepspeed_config "${CONFIG:-ds_configs/zero1_fp16.json}" \
    --train_batch_size "$rows" --gradient_accumulation_steps "$accumulation" --valid_batch_size 16 \
    --lr_schedule noam --learning_rate 1e-4 --warmup_steps 16000 --num_optim_steps "$steps" \
    --valid_step 10000 --save_step 5000 --save_minutes 60 \
    --output_dir "${OUTPUT:-models/$size}" "$@"
}
