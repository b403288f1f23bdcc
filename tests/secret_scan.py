"""Where secrets turn up that were planted: in texts, by the place of each, in every spelling that a value takes on its way.

A value counts as found in part of a longer word too: base64 of a file that has it in the middle, say.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote, quote_plus

DATA = "data of "
Found = list[tuple[str, str, str]]


def objects(kubectl: Callable[..., str], *namespaces: str) -> dict[str, str]:
    """Every object of these namespaces, and those of no namespace, as JSON by kind and name. The data of a Secret is apart."""
    told: dict[str, str] = {}
    for namespace in (None, *namespaces):
        scope = f"--namespaced={'false' if namespace is None else 'true'}"
        kinds = kubectl("api-resources", "--verbs=list", "--output=name", scope).split()
        place = [] if namespace is None else [f"--namespace={namespace}"]
        listed = kubectl("get", ",".join(kinds), "--output=json", "--show-managed-fields", *place)
        for item in json.loads(listed)["items"]:
            meta = item["metadata"]
            name = f"{item['kind']} {meta.get('namespace', '')}/{meta['name']}"
            if item["kind"] == "Secret":
                told[DATA + name] = json.dumps(item.pop("data", {}))
            told[name] = json.dumps(item)
    return told


def outside(found: Found) -> Found:
    """Those that are not where secrets belong."""
    return [each for each in found if not each[0].startswith(f"{DATA}Secret ")]


def spellings(value: str) -> dict[str, str]:
    """The value in each spelling, and what that is called. Backslashes are left out, as by `findings`."""
    words: dict[str, str] = {}
    for how, word in _spelled(value):
        words.setdefault(word, how)
    return words


def _spelled(value: str) -> Iterator[tuple[str, str]]:
    yield "as it is", value.replace("\\", "")
    yield "in a URL", quote(value, safe="")
    yield "in a path", quote(value)
    yield "in a query", quote_plus(value)
    yield "in hex", value.encode().hex()
    for text in (value, json.dumps(value)[1:-1]):
        for before in range(3):
            inner = _base64(text.encode(), before)
            yield "in base64", inner
            yield "in base64 for URLs", inner.replace("+", "-").replace("/", "_")


def _base64(value: bytes, before: int) -> str:
    """The characters that do not depend on the bytes before (that many, of three) and after it."""
    whole = base64.b64encode(bytes(before) + value).decode().rstrip("=")
    is_even = (before + len(value)) % 3 == 0
    return whole[-(-before * 8 // 6) : None if is_even else -1]


def findings(texts: Mapping[str, str], planted: Mapping[str, str]) -> Found:
    """Place, the secret's name, and how it is written there: for each text, by its place, that has a planted value."""
    wanted = [(name, word, how) for name, value in planted.items() for word, how in spellings(value).items()]
    # JSON in JSON in JSON has more backslashes each time.
    bare = {place: text.replace("\\", "") for place, text in texts.items()}
    found = ((place, name, how) for place, text in bare.items() for name, word, how in wanted if word in text)
    return list(dict.fromkeys(found))
