"""A model learns a game of several turns, to find a hidden number: fine-tuning on weak players' games, then GRPO. Offline, on a CPU.

    python examples/environments/guess.py

The players of the games that the model is fine-tuned on mostly guess at random, and often forget what they were told. Reinforcement learning
in the environment `guess` (verl/environments/guess.py) rewards the games that are won. The script prints the share of games with other
numbers of turns … before and after.
"""
