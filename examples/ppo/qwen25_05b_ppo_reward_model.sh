#!/usr/bin/env bash
# PPO with a critic on one GPU. The reward is the score of the model from qwen25_05b_reward_model.sh plus a small reward for the format.
# key=value arguments override these.
# Computed memory: 18 B per parameter, for actor and critic 17.8 GB, reference and reward model in bfloat16 2 GB,
# KV cache of 256 answers at a time 2.4 GB, activations of 16 Ki tokens 5 GB.
set -euo pipefail

python -m verl.trainer.ppo_trainer \
  data.train_files=~/data/gsm8k/train.jsonl \
  data.val_files=~/data/gsm8k/test.jsonl \
  data.prompts_per_step=256 \
  data.max_prompt_length=512 \
  data.max_tokens_per_micro_batch=16384 \
  model.partial_pretrain=./checkpoints/qwen25-05b-gsm8k/global_step_351 \
  algorithm.name=ppo \
  algorithm.updates_per_step=4 \
  algorithm.kl_coef=0.01 \
  algorithm.kl_in=reward \
  rollout.samples_per_prompt=1 \
  rollout.max_new_tokens=256 \
  reward.name=format \
  reward.weights=[0.1] \
  reward_model.path=./checkpoints/qwen25-05b-reward/global_step_1000 \
  critic.optim.lr=1e-5 \
  optim.lr=1e-6 \
  trainer.total_training_steps=100 \
  trainer.test_freq=20 \
  trainer.save_freq=20 \
  trainer.project_name=qwen25-05b-ppo \
  trainer.default_local_dir=./checkpoints/qwen25-05b-ppo \
  "$@"
