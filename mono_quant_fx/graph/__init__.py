"""What is known about an FX graph and how one is edited: weights and their consumers, annotations, memory, names.

GraphModules come in and are read, or changed in place by a pass that cloned them.
"""
