"""Measured problems on disk, so that a second plan measures nothing twice.

As in gemm/autotune/store.py each problem has a small file, named by a digest of its key, which also holds the full key:
the problem, the candidates, the mode, the GPU and all versions, and a checksum. Files are written aside and renamed.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from semisparse import native
from semisparse.documents import with_checksum, without_checksum
from semisparse.files import write_atomically
from semisparse.gemm.autotune.store import canonical, default_folder, make_own_folder, read_own
from semisparse.planning.timing import Times
from semisparse.versions import __version__, driver_version, package_version

logger = logging.getLogger(__name__)

SCHEMA = 1
_LONGEST, _MOST_BYTES = 1e12, 2**60
"""Milliseconds and bytes beyond which a record is taken to be damaged."""
_PACKAGES = ("triton", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12", "nvmath-python")


@dataclass(frozen=True)
class Measurement:
    """One problem with all candidates.

    Attributes:
        times: By candidate; dense is among them unless the whole problem could not be measured.
        cast: Of rounding the input to fp8 alone; None where no candidate does.
        dropped: Candidate -> why it has no times.
        packs: Candidate -> of packing the layer's weight once, and the bytes that it takes; only those whose times do
            not include it, because they pack per step.
        final: Whether the same would be found again: nothing ran out of memory or time, and nothing failed.
    """

    times: dict[str, Times]
    cast: Times | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    final: bool = True
    packs: dict[str, Times] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "times": {name: asdict(times) for name, times in self.times.items()},
            "cast": None if self.cast is None else asdict(self.cast),
            "dropped": self.dropped,
            "packs": {name: asdict(times) for name, times in self.packs.items()},
        }


def measurement(record: Mapping[str, Any]) -> Measurement:
    """A measurement from JSON values.

    Args:
        record: As Measurement.to_record gives it.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: The record is damaged.
    """
    cast = record["cast"]
    return Measurement(
        {str(name): times(one) for name, one in record["times"].items()},
        None if cast is None else times(cast),
        {str(name): str(why) for name, why in record["dropped"].items()},
        packs={str(name): times(one) for name, one in record.get("packs", {}).items()},
    )


def times(record: Mapping[str, Any]) -> Times:
    """Times from JSON values.

    Args:
        record: The fields of Times.

    Raises:
        OverflowError, TypeError, ValueError: The record is damaged.
    """
    made = Times(**record)
    values = (made.ms, made.device_ms, made.host_ms)
    if any(
        value is not None and not (type(value) in (int, float) and abs(float(value)) < _LONGEST) for value in values
    ):
        raise ValueError(f"{dict(record)} has a time that is no number")
    if made.ms is None or type(made.held_bytes) is not int or abs(made.held_bytes) > _MOST_BYTES:
        raise ValueError(f"{dict(record)} lacks a time, or its bytes are no integer")
    return made


def machine(device: torch.device) -> dict[str, str]:
    """GPU and versions that times depend on.

    Args:
        device: That is measured.
    """
    found = {
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": driver_version() or "none",
        "semisparse": __version__,
        "torch": str(torch.__version__),
        "launches": "native" if native.status().loaded else "Python",
    }
    return found | {name: version for name in _PACKAGES if (version := package_version(name)) is not None}


class PlanStore:
    """Measurements in a folder. No method raises.

    Args:
        folder: Default: the folder "plans" in that of the autotuner's results.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def load(self, key: Mapping[str, Any]) -> Measurement | None:
        """The stored measurement for exactly this key, or None. A damaged file is logged and measured again."""
        path = None
        try:
            path = self._path(key)
            content = without_checksum(json.loads(read_own(path)))
            if content["schema"] != SCHEMA or canonical(content["key"]) != canonical(key):
                raise ValueError("it has another schema or key")
            return measurement(content)
        except FileNotFoundError:
            return None
        except (
            AttributeError,
            KeyError,
            OSError,
            OverflowError,
            RecursionError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            logger.warning("ignored the stored plan %s: %s", path, error)
            return None

    def save(self, key: Mapping[str, Any], found: Measurement) -> None:
        """Write a measurement, if it is final; logs where that is not possible."""
        if not found.final:
            return
        try:
            path = self._path(key)
            make_own_folder(path.parent)
            text = json.dumps(with_checksum({"schema": SCHEMA, "key": key, **found.to_record()}), allow_nan=False)
            write_atomically(path, text.encode(), mode=0o600)  # read_own reads no file that others may write to
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("could not store measured times: %s", error)

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(canonical(key).encode()).hexdigest()
        return (self._folder or default_folder() / "plans") / f"{digest}.json"
