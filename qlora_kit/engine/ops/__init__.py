"""The kernels, each beside the same math in torch."""
