"""Whether servers load an artifact: tried where they are installed, else held against what they require."""
