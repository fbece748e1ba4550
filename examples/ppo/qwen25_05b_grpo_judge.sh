#!/usr/bin/env bash
# GRPO with a judge: a language model behind an OpenAI-style service grades each answer by a rubric, on one GPU. An answer without its
# `#### …` line gets nothing, and repetition costs. key=value arguments override these. On the judge's machine:
#   verl serve Qwen/Qwen2.5-7B-Instruct port=8000
# The judge is asked 512 times a step, and never twice about the same answer; its replies stay on disk for a run that goes on.
set -euo pipefail

python -m verl.trainer.ppo_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.prompts_per_step=64 \
  data.max_prompt_length=512 \
  data.max_tokens_per_micro_batch=16384 \
  model.partial_pretrain=./checkpoints/qwen25-05b-gsm8k/global_step_351 \
  algorithm.name=grpo \
  rollout.samples_per_prompt=8 \
  rollout.max_new_tokens=256 \
  reward.name='[judge,format,repetition]' \
  reward.weights='[1,0,0.5]' \
  reward.gates='{format: 1}' \
  reward.on_error=zero \
  reward.judge_url=http://localhost:8000/v1 \
  reward.judge_model=Qwen2.5-7B-Instruct \
  reward.judge_max_failures=500 \
  reward.judge_rubric='[{name: right, text: the final number is the right one, weight: 3}, {name: clear, text: each step follows from the one before}]' \
  optim.lr=1e-6 \
  trainer.total_training_steps=100 \
  trainer.save_freq=20 \
  trainer.project_name=qwen25-05b-grpo-judge \
  trainer.default_local_dir=./checkpoints/qwen25-05b-grpo-judge \
  "$@"
