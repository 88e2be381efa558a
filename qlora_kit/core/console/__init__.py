"""What the user reads.

`lines` has what goes on and results, `bar` how far something is, `session` how much of it all one command shows and the
log in its run directory, `safe` rich's console for texts of strangers.
"""
