"""How the maths of a step is run."""
