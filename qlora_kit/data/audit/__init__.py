"""What is wrong with tokenized rows, or worth knowing."""
