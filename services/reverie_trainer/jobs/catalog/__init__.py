"""Datasets: their versions, what is added to them, and from where."""
