"""spec.program: the user's own training function, in place of the built-in loop, called on each rank.

Whose fault an error is decides whether the run is tried again: what the function raises is UserCode and is not, unless it is the
echo of a lost rank or of memory that ran out.
"""

import importlib
import importlib.util
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ProgramSpec
from dsft_trainer.errors import TrainerError, failure_of

ENTRYPOINT = "spec.program.entrypoint"
DATASETS = "spec.program.datasets"
TRACEBACK_CHARACTERS = 2000
log = logging.getLogger(__name__)


def check_modules(program: ProgramSpec) -> None:
    """Look for the modules that the program names, without running them; packages that they are in are run.

    Raises:
        TrainerError: ConfigInvalid if one is not there. What such a package raises is no proof of that: ranks have GPUs.
    """
    for field, function in ((ENTRYPOINT, program.entrypoint), (DATASETS, program.datasets)):
        if function is None:
            continue
        module, _, _ = function.partition(":")
        try:
            is_there = importlib.util.find_spec(module) is not None
        except Exception as error:  # noqa: BLE001  Of a package that it is in, which is run.
            is_there = not _is_absent(module, error)
            log.info("%s: module %s was looked for: %s", field, module, error)
        if not is_there:
            raise _no_module(field, module)


def _is_absent(module: str, error: Exception) -> bool:
    """Whether the module itself was not found, and not one that it, or a package that it is in, wants to import."""
    return isinstance(error, ModuleNotFoundError) and bool(error.name) and f"{module}.".startswith(f"{error.name}.")


def run_program(program: ProgramSpec) -> None:
    """Import the entrypoint and call it with `config`.

    Raises:
        TrainerError: ConfigInvalid if there is no such function; UserCode, with the end of the traceback, for what it
            raises; another class where the error is not its own.
    """
    _call(ENTRYPOINT, program.entrypoint, program.config)


def datasets_of(program: ProgramSpec) -> dict[str, Any]:
    """Ray Data's datasets by name, as the function of `program.datasets` gives them; none without one.

    Raises:
        TrainerError: as `run_program`.
    """
    if program.datasets is None:
        return {}
    made = _call(DATASETS, program.datasets, program.config)
    if not isinstance(made, dict):
        raise TrainerError(
            FailureClass.USER_CODE,
            f"{DATASETS}: {program.datasets} returned {type(made).__name__}",
            "return a dict of ray.data.Dataset by name",
        )
    return made


def _call(field: str, function: str, config: Mapping[str, Any]) -> object:
    try:
        return _load(field, function)(dict(config))
    except TrainerError:
        raise
    except (Exception, SystemExit) as error:
        raise _users(error) from error


def _load(field: str, function: str) -> Callable[[dict[str, Any]], object]:
    name, _, attribute = function.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if _is_absent(name, error):
            raise _no_module(field, name) from error
        raise
    found = getattr(module, attribute, None)
    if not callable(found):
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"{field}: module {name} has no function {attribute}",
            "name a function of that module, as MODULE:FUNCTION",
        )
    return found


def _no_module(field: str, name: str) -> TrainerError:
    return TrainerError(
        FailureClass.CONFIG_INVALID,
        f"{field}: there is no module {name} in the trainer image, nor in spec.program.source",
        "put it into the archive of spec.program.source or into an image of your own (spec.image.trainer), or correct the name",
    )


def _users(error: BaseException) -> TrainerError:
    known = failure_of(error)
    if known.failure_class is not FailureClass.UNKNOWN:
        return known
    # Without our own frame, which calls the function.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    where = "".join(traceback.format_exception(type(error), error, frames)).strip()
    first = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    return TrainerError(FailureClass.USER_CODE, f"{first}\n{where[-TRACEBACK_CHARACTERS:]}")
