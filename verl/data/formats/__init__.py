"""Readers of data files, one module per format. `files` finds the reader of a file."""
