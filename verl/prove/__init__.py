"""`verl prove MODEL`: what of verl is exact for a model's architecture, shown on a tiny twin of it against code that verl did not write."""
