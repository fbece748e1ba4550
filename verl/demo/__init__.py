"""The offline demo: word problems, a small model, and the whole way from one to the other."""
