#!/usr/bin/env bash
# Fine-tune DialoGPT-medium (345M) on your own shards with one GPU of 12 to 16 GB.
#
#   python launch/fetch_models.py DialoGPT-medium        once, 0.9 GB
#   bash launch/finetune_12GB.sh [OPTION...]             options of launch/train.py, which go before those of here
#
# Variables:
#   DATA      folder with train and validation, as make_shards.py writes with --validation_fraction   (shards)
#   MODEL     Hugging Face folder   (models/DialoGPT-medium)
#   EPOCHS    passes over the data   (2; DialoGPT's README: 1 to 2)
#   OUTPUT    folder of the run   (models/finetuned)
#   CONFIG    DeepSpeed configuration   (bf16 where the GPU has it, else fp16)
#
# 64 rows a step, as DialoGPT fine-tuned on DSTC-7 with 64 for each GPU, in micro-batches of at most 1,024 tokens (4,096 on a card of
# 24 GB, 8,192 of 40, 16,384 of 80). The rate rises for 100 steps to 5e-5 and falls to 0: with DialoGPT's default, 16,000 steps of warm-up, a small corpus would be over before the rate is up.
#
#   memory    8.5 GiB, modelled: 6.6 of weights, gradients and optimizer, 1.0 of a micro-batch of 1,024 tokens at its peak, 0.9 of
#             buffers and CUDA (11.0 with 4,096 tokens, 14.2 with 8,192, 20.7 with 16,384). An evaluation's 16 rows take 0.6 instead of
#             a micro-batch's.
#   speed     7,400 tokens/s on a T4, 19,000 on an RTX 3090, 39,000 on an RTX 4090, 71,000 on an A100 of 40 GB, in rows of 512;
#             modelled, not measured (--dry_run --gpu NAME)
#
# To stop: touch OUTPUT/STOP, or Ctrl-C; to go on: the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/card.sh
. launch/card.sh
data=${DATA:-shards} model=${MODEL:-models/DialoGPT-medium} rows=64
if [ ! -f "$model/config.json" ]; then
  echo "error: MODEL=$model is no model folder; python launch/fetch_models.py DialoGPT-medium makes it" >&2
  exit 2
fi
factor=$(card_factor)
most=$((factor > 1 ? 2048 * factor : 1024))
# Optimizer steps in EPOCHS passes: the tokens of the training shards by those of a step (packed rows are 99 % full).
read -r steps accumulation < <(python - "$data/train/manifest.json" "${EPOCHS:-2}" "$rows" "$most" <<'PY'
import json, math, sys

try:
    manifest = json.load(open(sys.argv[1], encoding="utf-8"))
    tokens, length = manifest["totals"]["tokens"], manifest["max_seq_length"]
    rows, most = int(sys.argv[3]), int(sys.argv[4])
    micro = max((number for number in (1, 2, 4, 8, 16, 32, 64) if number * length <= most), default=1)
    print(max(math.ceil(float(sys.argv[2]) * tokens / (0.99 * length * rows)), 1), rows // micro)
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"error: {sys.argv[1]} (DATA and EPOCHS): {error!r}; preprocess/make_shards.py --validation_fraction 0.01 makes the shards")
PY
) || exit 2
if [ -z "${CONFIG:-}" ]; then
  CONFIG=$(python -c 'import torch
bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
print("ds_configs/zero1_" + ("bf16_fp32_accumulation" if bf16 else "fp16") + ".json")')
fi
warmup=$((steps / 10 < 100 ? steps / 10 + 1 : 100))
set -x
exec deepspeed --num_gpus 1 launch/train.py --model "$model" --expect_world_size 1 \
  --train_input_file "$data/train" --eval_input_file "$data/validation" \
  --deepspeed_config "$CONFIG" \
  --train_batch_size "$rows" --gradient_accumulation_steps "$accumulation" --valid_batch_size 16 \
  --lr_schedule cosine --learning_rate 5e-5 --warmup_steps "$warmup" --num_optim_steps "$steps" \
  --valid_step $((steps / 10 + 1)) \
  --output_dir "${OUTPUT:-models/finetuned}" "$@"
