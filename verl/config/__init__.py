"""Typed configurations with their defaults; keys of one method, reward or optimizer stand in its own file. Light to import: no torch.

A value stands here as the user typed it; what is derived from it has a name of its own where it is used.
Each comment above a field is its documentation (`verl sft --help` prints it).
"""
