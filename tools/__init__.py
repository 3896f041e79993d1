"""
What a user runs beside the core: python -m tools.NAME, from the repository's root.

The tools import the scripts at the top; nothing at the top imports a tool.
"""

import configurator  # noqa: F401  # before torch, for GOMP_SPINCOUNT
