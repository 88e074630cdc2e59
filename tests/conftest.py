"""Settings of all tests.

hypothesis has no deadline: the first example of a property compiles MLX functions with g++, and CI machines are slow.
"""

from hypothesis import settings

settings.register_profile("pomarium", deadline=None)
settings.load_profile("pomarium")
