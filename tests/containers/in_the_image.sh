#!/usr/bin/env bash
# What must work inside of the image, as its user; try_install.py runs each of these:  bash in_the_image.sh NAME
set -euo pipefail
entry=(/opt/venv/bin/python /workspace/launch/stoppable.py)
training=(
  launch/train.py --model tiny --train_input_file /tmp/shards --deepspeed_config ds_configs/cpu_fp32.json --train_batch_size 4
  --gradient_accumulation_steps 1 --valid_step 100000 --skip_eval --wandb_mode disabled
)

wait_for_steps() {
  until [ -s "$1/train_log.txt" ] && [ "$(wc -l < "$1/train_log.txt")" -gt 3 ]; do
    kill -0 "$2" || { echo "the run has ended before its third step" >&2; exit 1; }
    sleep 0.5
  done
}

# DeepSpeed's own report knows each operator as built or not.
operators() {
  python -m deepspeed.env_report 2>&1 | sed -n '/^op name/,/^DeepSpeed general/p' | tee /tmp/report
  for operator in cpu_adam fused_adam async_io; do
    grep -E "^$operator .*\[YES\].*\[.*OKAY.*\]" /tmp/report > /dev/null
  done
}

# The compiler's options are in the debug information: the Dockerfile's processor, not that of the machine which built them.
instructions() {
  local built
  built=$(echo /opt/venv/lib/python3*/site-packages/deepspeed/ops/adam/cpu_adam_op*.so)
  strings "$built" | grep --only-matching -e '-march=[a-z0-9-]*' | sort --unique | tee /tmp/processor
  [ "$(cat /tmp/processor)" = -march=x86-64-v3 ]
  objdump --disassemble "$built" > /tmp/code
  echo "instructions of AVX2 (ymm): $(grep --count ymm /tmp/code), of AVX-512 (zmm): $(grep --count zmm /tmp/code || true)"
  grep ymm /tmp/code > /dev/null
  if grep zmm /tmp/code > /dev/null; then exit 1; fi
}

default_command() {
  "${entry[@]}" dialogpt-train --help | head -3
}

shards() {
  for number in $(seq 400); do
    printf 'where are you from ? number %d EOS from the north , and you ?\tfrom the %d th street\n' "$number" "$number"
  done > /tmp/made_up.tsv
  python preprocess/make_shards.py --input /tmp/made_up.tsv --output /tmp/shards --max_seq_length 64 --workers 1
}

two_ranks() {
  time "${entry[@]}" deepspeed --num_gpus 2 "${training[@]}" --num_optim_steps 8 --output_dir models/trial
}

# DeepSpeed's CPU Adam from the wheel, as ZeRO-2 with the optimizer in the host's memory uses it.
cpu_adam() {
  python - <<'PY'
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(1000))
weight.grad = torch.full((1000,), 0.5)
DeepSpeedCPUAdam([weight], lr=0.1).step()
print("a step of CPU Adam:", weight[0].item())
assert abs(weight[0].item() - 0.9) < 1e-4
PY
}

stop_and_go_on() {
  "${entry[@]}" deepspeed --num_gpus 2 "${training[@]}" --num_optim_steps 100000 --output_dir models/stopped &
  local run=$! code=0
  wait_for_steps models/stopped "$run"
  kill -TERM "$run"
  wait "$run" || code=$?
  echo "exit code $code"
  [ "$code" -eq 75 ]
  local step
  step=$(cat models/stopped/checkpoints/latest)
  echo "$step"
  "${entry[@]}" deepspeed --num_gpus 2 "${training[@]}" --num_optim_steps $((10#${step#step-} + 3)) --output_dir models/stopped
}

# The launcher over pdsh and the image's ssh server, all as the image's user; SIGTERM to the server's container stops the run.
over_ssh() {
  if ls /etc/ssh/ssh_host_* 2> /dev/null; then exit 1; fi
  mkdir -p /tmp/keys
  ssh-keygen -q -t ed25519 -N "" -f /tmp/keys/id_ed25519
  cp /tmp/keys/id_ed25519.pub /tmp/keys/authorized_keys
  export SSH_KEYS=/tmp/keys GIVEN='with "quotes" and blanks'
  "${entry[@]}" bash launch/sshd.sh &
  local server=$! code=0
  until (echo > /dev/tcp/127.0.0.1/2222) 2> /dev/null; do kill -0 "$server"; sleep 0.2; done
  ssh localhost 'echo "in a session: $GIVEN, $(which python), $(id -un)"'
  echo "localhost slots=2" > /tmp/hosts
  deepspeed --force_multi --hostfile /tmp/hosts --master_addr 127.0.0.1 "${training[@]}" --num_optim_steps 100000 --output_dir /tmp/over_ssh &
  local run=$!
  wait_for_steps /tmp/over_ssh "$run"
  kill -TERM "$server"
  wait "$server" || code=$?
  echo "the ssh server's container ended with $code"
  wait "$run" || echo "the launcher ended with $?"
  cat /tmp/over_ssh/checkpoints/latest
  [ "$code" -eq 75 ]
}

"$1"
