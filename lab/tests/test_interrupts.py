"""Ctrl-C while a file is written and noted."""

import signal
import threading

import pytest

from semisparse_lab.interrupts import interrupted_later


def test_ctrl_c_waits_for_the_end_of_the_block_and_is_not_lost() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupted_later():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_comes_through_and_the_handler_is_back() -> None:
    with pytest.raises(OSError, match="full"), interrupted_later():
        raise OSError("full")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_is_done() -> None:
    seen = []

    def work() -> None:
        with interrupted_later():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
