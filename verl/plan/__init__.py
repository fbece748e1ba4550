"""`verl plan`: estimates the GPU memory of a run before it starts, and suggests config changes if it does not fit."""
