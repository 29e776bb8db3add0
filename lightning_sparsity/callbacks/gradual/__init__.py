"""Methods that remove weights during training."""
