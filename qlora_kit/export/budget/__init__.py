"""Mixed precision chosen by measurement: a mean number of bits is spent where the loss says that it matters.

spend.py                  the whole way: a target with a budget in, the same target with a format for each layer out
fisher.py                 how much the loss cares for each weight, from calibration rows
allocate.py               which layer gets which format, from what each would cost
gptq_formats.py, gguf_formats.py   the formats of a target, and its own rounding to them
reach.py                  budgets that no choice meets, told before a weight is loaded
"""
