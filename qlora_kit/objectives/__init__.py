"""What is learned: a folder for each objective, behind the protocol in `objective`; `registry` has them all.

A new one is a folder and a line of the registry. How rows become tokens and a mask is `data`'s, below this room.
"""
