#!/usr/bin/env bash
# Qwen2.5-7B-Instruct on GSM8K, on several nodes with eight GPUs of 80 GB each. Run the same command on every node; HEAD is one of them:
#   HEAD=node1 NODES=2 ./qwen25_7b_many_nodes.sh trainer.default_local_dir=/shared/checkpoints/qwen25-7b-gsm8k
# (under SLURM: examples/slurm/sft.sbatch). key=value arguments override these. trainer.default_local_dir must be on a file system that all
# nodes share. Computed memory per GPU on 16 GPUs: weights, gradients and moments in float32 16 B × 7.6 B / 16 = 7.6 GB; gathered embeddings
# with their gradients 9 GB; two layers, and gradients of one, 2 GB; activations of 16 Ki tokens with checkpointing 8 GB.
set -euo pipefail

: "${HEAD:?the name or address of one of the nodes}"
NODES="${NODES:-2}"

# 64 rows, about 14 Ki tokens, per GPU and step: one micro-batch each, for any number of nodes.
torchrun --nnodes="$NODES" --nproc_per_node=8 --rdzv_id=qwen25-7b-gsm8k --rdzv_backend=c10d --rdzv_endpoint="$HEAD:${PORT:-29500}" \
  -m verl.trainer.fsdp_sft_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompt_key=question \
  data.response_key=answer \
  data.max_length=2048 \
  data.max_tokens_per_micro_batch=16384 \
  data.train_batch_size=$((NODES * 8 * 64)) \
  model.partial_pretrain=Qwen/Qwen2.5-7B-Instruct \
  model.enable_gradient_checkpointing=true \
  optim.lr=1e-5 \
  trainer.total_epochs=3 \
  trainer.max_ckpt_to_keep=2 \
  trainer.project_name=qwen25-7b-gsm8k \
  trainer.default_local_dir=./checkpoints/qwen25-7b-gsm8k \
  trainer.logger=console \
  "$@"
