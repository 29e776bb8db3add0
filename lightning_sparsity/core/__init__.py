"""The engine: layers, masks, windows, and the keeper that joins them to Lightning."""
