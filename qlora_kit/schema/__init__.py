"""Recipes: typed, checked, explained."""
