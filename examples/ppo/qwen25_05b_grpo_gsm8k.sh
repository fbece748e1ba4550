#!/usr/bin/env bash
# GRPO on GSM8K from a fine-tuned checkpoint, graded by the number after ####, on one GPU. key=value arguments override these.
# Computed memory: 18 B per parameter (float32 weights, gradients, two moments; bfloat16 copy) 8.9 GB, the reference in bfloat16 1 GB,
# KV cache of 512 answers at a time 4.8 GB, activations of 16 Ki tokens 5 GB.
set -euo pipefail

python -m verl.trainer.ppo_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.val_files=~/data/gsm8k/test.jsonl \
  data.prompts_per_step=64 \
  data.max_prompt_length=512 \
  data.max_tokens_per_micro_batch=16384 \
  model.partial_pretrain=./checkpoints/qwen25-05b-gsm8k/global_step_351 \
  algorithm.name=grpo \
  rollout.samples_per_prompt=8 \
  rollout.max_new_tokens=256 \
  reward.name=gsm8k \
  optim.lr=1e-6 \
  trainer.total_training_steps=100 \
  trainer.test_freq=20 \
  trainer.save_freq=20 \
  trainer.project_name=qwen25-05b-grpo \
  trainer.default_local_dir=./checkpoints/qwen25-05b-grpo \
  "$@"
