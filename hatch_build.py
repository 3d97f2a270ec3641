"""Build hook of the wheel: with the native library and a platform tag where it can be built, else pure Python.

torch is not a build requirement, because every isolated build would then download all of it. The hook builds with the
torch of the environment that pip installs into, also from an isolated build; without one it makes the pure wheel.
SEMISPARSE_BUILD_NATIVE=1 makes torch a requirement of the build and a missing library an error, for releases; =0 asks
for the pure wheel.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "SEMISPARSE_BUILD_NATIVE"


class NativeBuildHook(BuildHookInterface):
    """Adds the native library to the wheel. An editable install has it in the source tree, where the hook builds it."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What the build needs beyond hatchling: torch, if the native library is required."""
        return [torch for torch in self.metadata.core.dependencies if torch.startswith("torch>=")] if _asked() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, and set the tag of the wheel.

        Args:
            version: "standard" or "editable".
            build_data: Tag and extra files of the wheel; changed in place.

        Raises:
            RuntimeError: If the library is required and can't be built.
        """
        native = _builder(Path(self.root) / "csrc" / "build.py")
        asked = _asked()
        if asked is False:
            self._pure(build_data, f"{VARIABLE}=0")
            return
        try:
            # Another compiler may warn about other things; that is no reason to leave a user without the library.
            line = native.build(strict=False)
        except (native.Unavailable, native.CompileError) as error:
            if asked:
                raise RuntimeError(f"{VARIABLE}=1, and the native library can't be built: {error}") from error
            self._pure(build_data, str(error))
            return
        build_data["artifacts"].append(str(native.LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        # The library calls torch alone and no function of Python's, so one wheel serves every Python 3.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        self.app.display_info(f"{line}; wheel {build_data['tag']}")

    def _pure(self, build_data: dict[str, Any], reason: str) -> None:
        build_data["pure_python"] = True
        build_data["tag"] = "py3-none-any"
        self.app.display_warning(f"native: left out, wheel py3-none-any; launches will go through Python: {reason}")


def _asked() -> bool | None:
    """Whether the library is required (True), unwanted (False), or built if possible (None).

    Raises:
        RuntimeError: If the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise RuntimeError(f"{VARIABLE} is {value!r}; use 1 (required), 0 (left out), or leave it unset (if possible)")
    return {"": None, "0": False, "1": True}[value]


def _builder(path: Path) -> ModuleType:
    """The module csrc/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("semisparse_csrc_build", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
