"""One module for each way of training that is compared; each has `train`, which measures a run, and `single_steps`."""
