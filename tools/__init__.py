"""
What a user runs beside the core: python -m tools.NAME, from the repository's root.

The tools import the scripts at the top; nothing at the top imports a tool.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded, as in train.py
