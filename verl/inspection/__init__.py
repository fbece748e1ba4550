"""`verl inspect`: what a trainer would make of its data, before it trains."""
