"""Checks that every section of the configuration shares: sentences, for one `ConfigError` with all."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def below_one(section: str, **values: int) -> list[str]:
    """Counts that count nothing."""
    return [
        f"{section}: {name} is {value}; it must be at least 1" for name, value in values.items() if value < 1
    ]


def meaningless(section: str, fields: Any) -> list[str]:
    """NaN and infinity, which comparisons let pass, and empty strings: an unset shell variable."""
    values = {entry.name: getattr(fields, entry.name) for entry in dataclasses.fields(fields)}
    return [
        f"{section}: {name} is {value}; it must be a finite number"
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ] + [
        f"{section}: {name} is empty; give a value or drop --{name.replace('_', '-')}"
        for name, value in values.items()
        if isinstance(value, str) and not value.strip()
    ]
