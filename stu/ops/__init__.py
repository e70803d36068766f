"""Pure functions on tensors: the fast form of an operation and its readable reference, side by side."""
