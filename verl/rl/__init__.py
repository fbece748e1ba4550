"""Reinforcement learning: prompts to answers to experience to updates."""
