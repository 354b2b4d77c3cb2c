"""The static convolution that a dynamic layer amounts to: its form, its kernel, its error."""
