#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on GSM8K, on four GPUs of 80 GB or less, weights and optimizer in host memory. key=value arguments
# override these. Computed memory: host 16 B × 7.6 B = 122 GB, and as much again while the weights are loaded; each GPU: gathered embeddings
# with their gradients 9 GB; two layers, and gradients of one, 2 GB; activations of 32 Ki tokens with checkpointing 15 GB.
set -euo pipefail

# The weights move to the GPUs twice per step and the CPU updates them, so a step has twice as many tokens as without offloading. The update
# uses all cores; torchrun would give each process only one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 3) / 4))}"

torchrun --standalone --nnodes=1 --nproc_per_node=4 -m verl.trainer.fsdp_sft_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompt_key=question \
  data.response_key=answer \
  data.max_length=2048 \
  data.max_tokens_per_micro_batch=32768 \
  data.train_batch_size=512 \
  model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct \
  model.enable_gradient_checkpointing=true \
  model.fsdp_config.cpu_offload=true \
  optim.lr=1e-5 \
  trainer.total_epochs=3 \
  trainer.max_ckpt_to_keep=2 \
  trainer.project_name=qwen25-7b-gsm8k-offload \
  trainer.default_local_dir=./checkpoints/qwen25-7b-gsm8k-offload \
  trainer.logger=console \
  "$@"
