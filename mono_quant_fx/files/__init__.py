"""Tensor files and folders of them: read without trust, written whole or not at all.

Paths and tensors come in, views of mapped files and typed errors go out. Nothing here knows of models or codes.
"""
