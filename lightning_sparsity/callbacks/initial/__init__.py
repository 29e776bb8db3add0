"""Methods that make masks before the first step."""
