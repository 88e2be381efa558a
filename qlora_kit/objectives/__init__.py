"""What is learned: a folder for each objective."""
