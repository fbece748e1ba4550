"""One file a grader, shared by the evaluator and by reinforcement learning."""
