"""FSDP2 with 2:4-compressed all-gathers: kept values and a bitmask travel instead of whole weights."""

from semisparse.integrations.fsdp.compress import GatherReport, compress_all_gather

__all__ = ["GatherReport", "compress_all_gather"]
