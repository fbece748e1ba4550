"""The proofs: one file each, with GROUP, NAME and `prove(subject) -> Outcome`. A new file is a new line of the table."""
