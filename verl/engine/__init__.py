"""Forward, backward, step and checkpoint on one process or many."""
