#!/usr/bin/env bash
# Sourced by pretrain.sh and finetune_12GB.sh.

# card_factor: prints by how much larger micro-batches may be than those of cards of 12 to 16 GB, by the smallest card of this machine
card_factor() {
  local mib
  mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n | head -n 1 || true)
  if ((${mib:-0} >= 75000)); then
    echo 8 # of 80 GB
  elif ((${mib:-0} >= 38000)); then
    echo 4 # of 40 and 48 GB
  elif ((${mib:-0} >= 22000)); then
    echo 2 # of 24 and 32 GB
  else
    echo 1
  fi
}
