"""The offline demo: word problems, a small model, and all steps from one to the other."""
