"""The recipe's optimizer: which one runs here, its groups of weights, bitsandbytes over flat buffers."""
