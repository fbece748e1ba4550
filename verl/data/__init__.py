"""Data files to packed batches: source, render, documents, pack, batch, loader, report."""
