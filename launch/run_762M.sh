#!/usr/bin/env bash
# Train the 762M model on 8 GPUs with the settings of DialoGPT.
#
#   bash launch/run_762M.sh                                                           from random weights
#   bash launch/run_762M.sh --init_checkpoint models/gpt2-large --learning_rate 1e-5    from OpenAI's (launch/fetch_models.py gpt2-large)
#
# launch/pretrain.sh says which variables choose data, GPUs, hosts and output, and how to stop and go on.
#
# Zhang et al. 2020 (DialoGPT, arXiv:1911.00536): 32 examples for each of 16 GPUs and step (table 2), the Noam schedule with 16,000 steps
# of warm-up, 3 epochs at most of 147 million conversations. The authors' --max_seq_length 512, and rates from 1e-5 to 1e-4, are in issue
# 22 of their repository. The same 512 examples a step, 41 tokens each, are 21,000 tokens: 5 packed rows for each of 8 GPUs.
#
#   steps    294,000 an epoch (6.01 billion tokens, by the README of DialoGPT); 883,000 for 3 epochs
#   memory   9.2 GiB on each of 8 GPUs, modelled: 4.3 of weights, gradients and optimizer under ZeRO-1, 3.9 of a micro-batch at its peak
#            (compute capability 8.0 and later), 0.9 of buffers, CUDA and NCCL. PyTorch's allocator keeps some percent more.
#   speed    238,000 tokens/s on 8 A100 of 40 GB, 615,000 on 8 H100, both over NVLink; modelled, not measured
#            (--dry_run --gpu NAME). Published: llm-foundry 280,000 on 8 A100 of 40 GB (its table: 760M,
#            rows of 512, 53 % MFU). DialoGPT's own code: 71,356 on 8 V100, for a size that its README doesn't name.
#   time     3 epochs take 21 hours on those A100, 8.2 on those H100
# shellcheck source=launch/pretrain.sh
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
pretrain 762M 5 883000 "$@"
