"""The lab of semisparse: small models, data and experiments that show what 2:4 sparse training does to accuracy.

A distribution of its own beside the library. Its command is `semisparse-lab`.
"""

__version__ = "0.1.0"
