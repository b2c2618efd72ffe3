"""Plain PyTorch definitions of every operation: the oracle of the tests. No custom operator."""
