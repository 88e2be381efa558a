"""Parts of `scripts/bench/train_step.py`: what is run, on which model and rows, by which stack, how it is measured."""
