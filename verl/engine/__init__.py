"""Forward and backward pass, optimizer step and checkpoints, in one process or many."""
