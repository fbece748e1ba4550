#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on GSM8K, on four GPUs of 80 GB. Arguments override these: ./qwen25_7b_four_gpus.sh data.train_batch_size=128
# Computed memory per GPU: weights, gradients and moments in float32 16 B × 7.6 B / 4 = 30.5 GB; gathered embeddings with their
# gradients 9 GB; two layers, and gradients of one, 2 GB; activations of 16 Ki tokens with checkpointing 8 GB.
set -euo pipefail

# 256 rows, about 54 Ki tokens, are one micro-batch per GPU and step: with a second one, FSDP2 would keep 4 B × 7.6 B of unsharded gradients.
# A checkpoint takes 107 GB. One is saved at the end of each epoch, and the last two are kept.
torchrun --standalone --nnodes=1 --nproc_per_node=4 -m verl.trainer.fsdp_sft_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompt_key=question \
  data.response_key=answer \
  data.max_length=2048 \
  data.max_tokens_per_micro_batch=16384 \
  data.train_batch_size=256 \
  model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct \
  model.enable_gradient_checkpointing=true \
  optim.lr=1e-5 \
  trainer.total_epochs=3 \
  trainer.max_ckpt_to_keep=2 \
  trainer.project_name=qwen25-7b-gsm8k \
  trainer.default_local_dir=./checkpoints/qwen25-7b-gsm8k \
  trainer.logger=console \
  "$@"
