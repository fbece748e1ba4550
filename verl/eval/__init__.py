"""Evaluating a checkpoint on a file of questions and answers."""
