"""Pieces of the HTML that reports share, with their style and scripts. Data comes in, text goes out."""
