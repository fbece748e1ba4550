#!/usr/bin/env bash
# A reward model from preference pairs ({"prompt": …, "chosen": …, "rejected": …}, one per line), on one GPU. key=value arguments
# override these.
# Computed memory: 18 B per parameter (float32 weights, gradients, two moments; bfloat16 copy) 8.9 GB, activations of 16 Ki tokens 2 GB.
set -euo pipefail

python -m verl.trainer.reward_trainer \
  data.train_files=~/data/pairs/train.jsonl \
  data.val_files=~/data/pairs/test.jsonl \
  data.train_batch_size=64 \
  data.max_length=1024 \
  data.max_tokens_per_micro_batch=16384 \
  model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
  algorithm.name=bradley_terry \
  optim.lr=1e-5 \
  trainer.total_epochs=1 \
  trainer.project_name=qwen25-05b-reward \
  trainer.default_local_dir=./checkpoints/qwen25-05b-reward \
  "$@"
