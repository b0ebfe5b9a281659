"""Graphs and results for people: drawings, and the story of one weight or node in words."""
