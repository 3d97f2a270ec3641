"""What the source of a model's modules does with the weights of their layers."""

from semisparse.surgery.source.reads import Reading, reading_of
from semisparse.surgery.source.walk import Uses

__all__ = ["Reading", "Uses", "reading_of"]
