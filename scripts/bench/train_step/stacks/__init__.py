"""One module for each way of training that is compared, imported only where its stack is measured.

Each has `train(run, base, work, profiled)`, which measures a run: `base` is the folder of the model, for a stack that
loads one, `work` a folder of its own, and `profiled` asks ours for a profile of one more step. Two have `single_steps`.
"""
