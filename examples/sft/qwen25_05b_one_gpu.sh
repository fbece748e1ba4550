#!/usr/bin/env bash
# Qwen2.5-0.5B-Instruct on GSM8K, on one GPU (or, slowly, on the CPU). Arguments override these: ./qwen25_05b_one_gpu.sh optim.lr=1e-5
# Computed memory: 18 B per parameter (float32 weights, gradients, two moments; bfloat16 copy) 8.9 GB, activations of 2 Ki tokens 1 GB.
set -euo pipefail

python -m verl.trainer.fsdp_sft_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompt_key=question \
  data.response_key=answer \
  model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
  data.micro_batch_size_per_gpu=2 \
  model.enable_gradient_checkpointing=true \
  optim.lr=2e-5 \
  trainer.total_epochs=1 \
  trainer.project_name=qwen25-05b-sft-demo \
  trainer.default_local_dir=./checkpoints \
  trainer.logger=console \
  "$@"
