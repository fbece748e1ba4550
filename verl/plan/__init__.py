"""The plan before the run: what it will take of a GPU, and what to change where that is too much."""
