"""The form of files that people write: the codec's data as TOML, with short forms for what is written often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ..model.codec import Dialect
from ..model.errors import SpecError
from ..model.spec import Limit, Tenant
from ..policy import Condition, Step
from ..toml import TOML

__all__ = ["NONE", "dialect"]

NONE: Final = "none"
"""The word for None where a parameter may be None, as TOML has no null."""


def _limit(data: Any) -> Any:
    if isinstance(data, int | float) and not isinstance(data, bool):
        return {"rate": data}
    if not isinstance(data, Mapping):
        raise SpecError("must be events a second, or a table such as { rate = 100, burst = 10 }")
    return data


def _several(data: Any) -> Any:
    """A single condition may be written without an array."""
    return [data] if isinstance(data, Mapping) else data


def _patterns(data: Any) -> Any:
    names = [data] if isinstance(data, str) else data
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise SpecError("must be a pattern such as 'web-*', or several")
    return names


def _flag_or_names(data: Any) -> Any:
    names = [data] if isinstance(data, str) else data
    if isinstance(names, bool) or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return names
    raise SpecError("must be true, false, or names of policies")


def tables(kind: type, how: str) -> Callable[[Any], Any]:
    """A form that refuses data of another type. `how` says in the message how to write them."""

    def form(data: Any) -> Any:
        if not isinstance(data, kind):
            raise SpecError(f"must be {how}")
        return data

    return form


_FORMS: Final[Mapping[Any, Callable[[Any], Any]]] = {
    Limit: _limit,
    tuple[Condition, ...]: _several,
    Iterable[Step]: tables(list, "an array of tables such as { rung = 'warn', when = { signal = 'exits', over = 5 } }"),
    tuple[str, ...] | None: _patterns,
    bool | tuple[str, ...]: _flag_or_names,
    Mapping[str, Tenant]: tables(dict, "[tenants.NAME] tables"),
}
_REMEDIES: Final = {(Limit, "bus_share"): "for a part of the bus' time take a policy of kind = 'bus-time'"}


def dialect(forms: Mapping[Any, Callable[[Any], Any]] | None = None) -> Dialect:
    """The dialect of files of rules, of fleets and of scenarios. `forms` are more short forms."""
    return Dialect(none=NONE, words=TOML.words, bits=TOML.bits, forms={**_FORMS, **(forms or {})}, remedies=_REMEDIES)
