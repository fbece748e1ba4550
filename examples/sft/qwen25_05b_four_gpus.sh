#!/usr/bin/env bash
# Qwen2.5-0.5B-Instruct on GSM8K, on the four GPUs of one machine. Arguments override these: ./qwen25_05b_four_gpus.sh trainer.logger=console
# Computed memory per GPU: 16 B per parameter over 4 GPUs 2 GB, gathered embeddings with their gradients 1.1 GB, activations of 8 Ki tokens 2 GB.
set -euo pipefail

torchrun --standalone --nnodes=1 --nproc_per_node=4 -m verl.trainer.fsdp_sft_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompt_key=question \
  data.response_key=answer \
  data.micro_batch_size_per_gpu=4 \
  data.max_length=2048 \
  model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
  model.strategy=fsdp2 \
  model.enable_gradient_checkpointing=true \
  model.use_liger=false \
  optim.lr=1e-4 \
  optim.warmup_steps_ratio=0.1 \
  optim.clip_grad=1.0 \
  trainer.total_epochs=3 \
  trainer.project_name=qwen25-05b-gsm8k \
  trainer.default_local_dir=./checkpoints/qwen25-05b-gsm8k \
  trainer.experiment_name=qwen25-05b-gsm8k-sft \
  trainer.logger=wandb \
  "$@"
