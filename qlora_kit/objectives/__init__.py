"""What is learned: a folder for each objective, behind the protocol in `objective`; `registry` has them all.

`sft` is the one there is, and `training/` takes it; a second one is a folder, a line of the registry and the choice in
a recipe. How a conversation becomes tokens and a mask is `data`'s, below this room: scoring and exports render it too.
"""
