"""Control over calls that C++ starts on its own; every function does nothing where the library is not used."""

from semisparse.native.loading import library


def watch(more: int) -> None:
    """Add a watcher (1), or take one away (-1); while there are any, Python answers every call."""
    found = library()
    if found is not None:
        found.watch(more)


def started() -> int:
    """Sparse products that C++ started, or recorded in a CUDA graph, since the process began."""
    found = library()
    return 0 if found is None else found.started()


def started_dense() -> int:
    """Masked-dense products that C++ started, as `started` counts sparse ones."""
    found = library()
    return 0 if found is None else found.started_dense()


def forget_products() -> None:
    """Let every product ask Python again, because choices have changed."""
    found = library()
    if found is not None:
        found.forget_products()
