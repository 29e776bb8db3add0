"""Methods that learn their masks by gradient."""
