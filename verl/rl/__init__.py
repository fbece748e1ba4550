"""Reinforcement learning: from prompts to answers, to experience, to updates."""
