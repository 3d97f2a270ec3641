"""A kernel's source in small: an archive of made-up files, and tokens that need no tokenizer."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np

from semisparse_lab.data.linux import PARTS
from semisparse_lab.data.tokens import described, write_manifest, write_tokens

WORDS = ("int", "void", "static", "struct", "return", "if", "for", "dev", "ptr", "size", "lock", "irq", "reg")


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    """A .tar.xz with these files in one folder."""
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"linux-source-9/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def source_files(count: int) -> dict[str, bytes]:
    """C files with different contents."""
    numbers = random.Random(0)
    return {
        f"drivers/x{number % 7}/f{number}.c": "\n".join(
            "\t" * numbers.randint(0, 2) + " ".join(numbers.choices(WORDS, k=5)) + f" {number};" for _ in range(4)
        ).encode()
        for number in range(count)
    }


def write_toy_tokens(folder: Path, train: int = 6000, other: int = 200) -> Path:
    """A folder as data.tokens.prepare leaves it: 64 tokens, each followed by one of few others."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, counts = np.random.default_rng(0), {"train": train, "validation": other, "test": other}
    lengths = [1 + token % 5 for token in range(64)]
    sets = {}
    for part in PARTS:
        steps = numbers.integers(1, 4, counts[part])
        sets[part] = (np.cumsum(steps) % 64).astype("<u2")
        write_tokens(folder / f"{part}.npy", sets[part])
    write_manifest(
        folder,
        {
            "asked": {},
            "files": {f"{part}.npy": described(folder / f"{part}.npy") for part in PARTS},
            "token_bytes": lengths,
            "tokens": {part: len(tokens) for part, tokens in sets.items()},
            "bytes": {part: int(np.array(lengths)[tokens].sum()) for part, tokens in sets.items()},
        },
    )
    return folder
