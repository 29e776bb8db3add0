"""Methods whose masks move while the network trains."""
