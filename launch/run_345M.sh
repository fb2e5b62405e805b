#!/usr/bin/env bash
# Train the 345M model on 8 GPUs with the settings of DialoGPT.
#
#   bash launch/run_345M.sh                                                           from random weights
#   bash launch/run_345M.sh --init_checkpoint models/gpt2-medium --learning_rate 1e-5    from OpenAI's (launch/fetch_models.py gpt2-medium)
#
# launch/pretrain.sh says which variables choose data, GPUs, hosts and output, and how to stop and go on.
#
# Zhang et al. 2020 (DialoGPT, arXiv:1911.00536): 64 examples for each of 16 GPUs and step (table 2), the Noam schedule with 16,000 steps
# of warm-up, 5 epochs at most of 147 million conversations. The authors' --max_seq_length 512, and rates from 1e-5 to 1e-4, are in issue
# 22 of their repository. The same 1,024 examples a step, 41 tokens each, are 42,000 tokens: 10 packed rows for each of 8 GPUs.
#
#   steps    147,000 an epoch (6.01 billion tokens, by the README of DialoGPT); 736,000 for 5 epochs
#   memory   7.2 GiB on each of 8 GPUs, modelled: 2.0 of weights, gradients and optimizer under ZeRO-1, 4.3 of a micro-batch at its peak
#            (compute capability 8.0 and later), 0.9 of buffers, CUDA and NCCL. PyTorch's allocator keeps some percent more.
#   speed    543,000 tokens/s on 8 A100 of 40 GB, 1,432,000 on 8 H100, both over NVLink; modelled, not measured
#            (--dry_run --gpu NAME). Published: llm-foundry 530,000 on 8 A100 of 40 GB (its table: 350M,
#            rows of 512, 48 % MFU). DialoGPT's own code: 71,356 on 8 V100, for a size that its README doesn't name.
#   time     5 epochs take 15.4 hours on those A100, 5.8 on those H100
# shellcheck source=launch/pretrain.sh
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
pretrain 345M 10 736000 "$@"
