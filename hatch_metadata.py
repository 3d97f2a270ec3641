"""Metadata hook of wheel and sdist: the page that an index shows, and the project's addresses.

README.md links to files of the repository by their paths, which hold there and nowhere else. With SEMISPARSE_URL, the
address of the repository, the page has absolute links to the files of this version, and the metadata names the
project's pages. A release must set it; without it the links stay as they are, and the build says so.
"""

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "SEMISPARSE_URL"
PAGES = {"Homepage": "", "Documentation": "/blob/{tag}/docs/index.md", "Changelog": "/blob/{tag}/CHANGELOG.md",
         "Issues": "/issues", "Source": ""}  # fmt: skip
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?://|#|mailto:)(?P<path>[^)\s]+)\)")


class AddressMetadataHook(MetadataHookInterface):
    """Fills in readme and urls, which pyproject.toml declares as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Add them.

        Args:
            metadata: Of the project; changed in place.

        Raises:
            ValueError: The address is none.
        """
        root, address = Path(self.root), os.environ.get(VARIABLE, "").rstrip("/")
        text = (root / "README.md").read_text(encoding="utf-8")
        if address:
            tag = "v" + runpy.run_path(str(root / "src" / "semisparse" / "versions.py"))["__version__"]
            text = absolute(text, address, tag)
            metadata["urls"] = {name: address + page.format(tag=tag) for name, page in PAGES.items()}
        else:
            print(f"{VARIABLE} is not set: links of the page stay relative, and no address is named", file=sys.stderr)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, address: str, tag: str) -> str:
    """A page whose links to files of the repository are absolute.

    Args:
        text: Markdown.
        address: Of the repository, https://HOST/OWNER/NAME.
        tag: The version that links lead to.

    Raises:
        ValueError: address is none.
    """
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", address):
        raise ValueError(f"{VARIABLE}={address!r} is no address of a repository: write https://HOST/OWNER/NAME")

    def linked(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({address}/{kind}/{tag}/{found['path']})"

    return _LINK.sub(linked, text)
