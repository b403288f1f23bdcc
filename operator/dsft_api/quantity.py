"""Kubernetes quantities as numbers."""

import re
from decimal import Decimal

_SUFFIXES = {
    "": Decimal(1),
    **{letter: Decimal(1000) ** -(power + 1) for power, letter in enumerate("mun")},
    **{letter: Decimal(1000) ** (power + 1) for power, letter in enumerate("kMGTPE")},
    **{f"{letter}i": Decimal(1024) ** (power + 1) for power, letter in enumerate("KMGTPE")},
}


def quantity(text: int | str) -> Decimal:
    """A Kubernetes quantity as a number (apimachinery resource.Quantity)."""
    number, suffix = re.fullmatch(r"(.*?)([numkKMGTPE]i?)?", str(text)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return Decimal(number) * _SUFFIXES[suffix or ""]
