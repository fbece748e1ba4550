"""Evaluation of a checkpoint on a file of questions and answers."""
