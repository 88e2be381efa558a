"""Whether a model can be written as a recipe says, told before anything is merged or scored."""
