"""One file per algorithm: its loss over a Batch, as sums that the engine divides."""
