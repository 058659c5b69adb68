"""Bridges between a frozen vision encoder and a frozen language model.

Letters in every shape of this library:
b conversations · t text positions · n images in the batch · p patches of an image · k slots of an image
m memory tokens · v vision width · d language width · y x pixels
"""

__version__ = "0.1.0"
