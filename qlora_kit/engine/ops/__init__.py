"""The kernels, each beside the same maths in torch."""
