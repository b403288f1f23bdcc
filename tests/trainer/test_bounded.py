"""Work at the end of a process that may fail or never be done."""

import threading

from dsft_trainer.bounded import within


def test_its_result() -> None:
    assert within(30, lambda: "done") == "done"


def test_an_error_is_no_result() -> None:
    def fails() -> str:
        raise OSError("the disk is full")

    assert within(30, fails) is None


def test_what_hangs_is_left_behind() -> None:
    never = threading.Event()
    assert within(0.05, never.wait) is None
    never.set()
