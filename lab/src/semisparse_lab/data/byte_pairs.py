"""A byte-pair tokenizer for source code, trained by Hugging Face's tokenizers.

The package is one of the lab's extra `text`. It is imported only where text is made into tokens: training needs none.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from semisparse_lab.data.linux import END, OnProgress
from semisparse_lab.errors import DataError

LARGEST_VOCABULARY = 8192
INSTALL = "pip install 'semisparse-lab[text]'"
END_TOKEN = "<|end|>"
"""Stands for END; its number is 0."""
TRAINED_ON = 4
"""The tokenizer is trained on every fourth file for training, which takes half a minute."""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n\t]*|\s*[\r\n]+[\t]*|\s+(?!\S)|\s+"
"""Tokens do not cross these: words with what precedes them, three digits, signs with the end of a line, space."""
_AT_ONCE = 512


def trained_tokenizer(text: bytes, vocabulary: int, on_progress: OnProgress = lambda *_: None) -> str:
    """The JSON of a tokenizer trained on files for training. Equal arguments give equal bytes.

    Args:
        text: Files, each followed by END.
        vocabulary: Tokens, at most LARGEST_VOCABULARY; text with little variety gives fewer.
        on_progress: Told of the files that were read.

    Raises:
        DataError: tokenizers is missing, or vocabulary is outside its range.
    """
    if not 257 <= vocabulary <= LARGEST_VOCABULARY:
        raise DataError(
            f"vocabulary={vocabulary} must lie between 257, the bytes and the end, and {LARGEST_VOCABULARY}"
        )
    library = _library()
    before, models, trainers = library.pre_tokenizers, library.models, library.trainers
    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = before.Sequence(
        [
            before.Split(library.Regex(_WORDS), "isolated"),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(before.ByteLevel.alphabet()),
        show_progress=False,
    )
    files = _files(text)[::TRAINED_ON]
    tokenizer.train_from_iterator(_told(files, "files for the tokenizer", on_progress), trainer)
    return str(tokenizer.to_str())


def token_lengths(tokenizer: str) -> list[int]:
    """Bytes that each token stands for, in the order of their numbers; END is one byte.

    Args:
        tokenizer: JSON of trained_tokenizer.
    """
    vocabulary = _library().Tokenizer.from_str(tokenizer).get_vocab()
    names = sorted(vocabulary, key=vocabulary.__getitem__)  # a byte-level token has one character for each byte
    return [len(END) if name == END_TOKEN else len(name) for name in names]


def encoded(tokenizer: str, text: bytes, part: str, on_progress: OnProgress = lambda *_: None) -> np.ndarray[Any, Any]:
    """The tokens of files, uint16; each file ends with token 0.

    Args:
        tokenizer: JSON of trained_tokenizer.
        text: Files, each followed by END.
        part: Name of the set, for on_progress.
        on_progress: Told of the files that were read.
    """
    made, files, pieces = _library().Tokenizer.from_str(tokenizer), _files(text), []
    for start in range(0, len(files), _AT_ONCE):
        for encoding in made.encode_batch_fast(files[start : start + _AT_ONCE], add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, 0], dtype="<u2"))
        on_progress(f"files as tokens, {part}", min(start + _AT_ONCE, len(files)), len(files))
    return np.concatenate(pieces)


def _files(text: bytes) -> list[str]:
    return text.decode().split(END)[:-1]


def _told(files: Sequence[str], what: str, on_progress: OnProgress) -> Iterator[str]:
    for number, file in enumerate(files, start=1):
        yield file
        on_progress(what, number, len(files))


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            f"text cannot be made into tokens without the package tokenizers ({error}): {INSTALL}"
        ) from error
