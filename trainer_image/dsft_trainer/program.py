"""spec.program: the user's own training function, in place of the built-in loop, called on each rank.

Whose fault an error is decides whether the run is tried again: what the function raises is UserCode and is not, unless it is the
echo of a lost rank or of memory that ran out.
"""

import importlib
import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ProgramSpec
from dsft_trainer.errors import TrainerError, failure_of

FIELD = "spec.program.entrypoint"
TRACEBACK_CHARACTERS = 2000


def check_module(program: ProgramSpec) -> None:
    """Look for the module in the image, without running it.

    Raises:
        TrainerError: ConfigInvalid if it is not there.
    """
    module, _, _ = program.entrypoint.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise _no_module(module)


def run_program(program: ProgramSpec) -> None:
    """Import the function and call it with `config`.

    Raises:
        TrainerError: ConfigInvalid if there is no such function; UserCode, with the end of the traceback, for what it
            raises; another class where the error is not its own.
    """
    try:
        _load(program.entrypoint)(dict(program.config))
    except TrainerError:
        raise
    except (Exception, SystemExit) as error:
        raise _users(error) from error


def _load(entrypoint: str) -> Callable[[dict[str, Any]], object]:
    name, _, attribute = entrypoint.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that the module itself wants to import is its own fault.
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise _no_module(name) from error
        raise
    function = getattr(module, attribute, None)
    if not callable(function):
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"{FIELD}: module {name} has no function {attribute}",
            "name a function of that module, as MODULE:FUNCTION",
        )
    return function


def _no_module(name: str) -> TrainerError:
    return TrainerError(
        FailureClass.CONFIG_INVALID,
        f"{FIELD}: there is no module {name} in the trainer image",
        "install it in an image of your own (spec.image.trainer), or correct the name",
    )


def _users(error: BaseException) -> TrainerError:
    known = failure_of(error)
    if known.failure_class is not FailureClass.UNKNOWN:
        return known
    # Without our own frames: the first one calls the function.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    where = "".join(traceback.format_exception(type(error), error, frames)).strip()
    first = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    return TrainerError(FailureClass.USER_CODE, f"{first}\n{where[-TRACEBACK_CHARACTERS:]}")
