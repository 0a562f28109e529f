"""Data written for this course, the miniatures made from it, and what made both."""
