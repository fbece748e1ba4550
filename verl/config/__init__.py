"""Typed configurations, and the only place for defaults. Importing them does not import torch.

A field holds the value that the user typed; derived values have other names, where they are used. The comment above a field is its
documentation (`verl sft --help` prints it).
"""
