"""Mixed precision chosen by measurement: a mean number of bits is spent where the loss says that it matters.

choose.py                 the whole way: what each format costs each layer, and the choice
fisher.py                 how much the loss cares for each weight, from calibration rows
allocate.py               which layer gets which format, from what each would cost
feasible.py               budgets that no choice meets, told before a weight is loaded

Which formats a file's layers may have, and what its own rounding does, is in its folder below `formats/`.
"""
