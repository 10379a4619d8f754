"""Whatever the words can say comes back from JSON as it was; whatever else comes is an error that names its path."""

from __future__ import annotations

import json
import math
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.model import exits
from orchestra.model.codec import DEPTH, TAGGED, decode, encode, from_document, to_document

LIMITS = st.builds(
    orc.Limit,
    rate=st.floats(1e-6, 1e9),
    burst=st.none() | st.floats(1, 1e9),
    max_delay=st.none() | st.floats(1e-6, 1e6),
)
NAMES = st.sampled_from(["a", "web-1", "db.2"])
TEXTS = st.text(max_size=5)
EVIDENCE = st.dictionaries(TEXTS, st.none() | st.integers() | TEXTS | st.floats(-9, 9), max_size=3)
ABOUT = {"vm": NAMES, "reason": st.text(max_size=9), "evidence": EVIDENCE, "generation": st.none() | st.integers(1, 99)}
METERS = st.sampled_from(list(orc.Meter))
ON_VM = (orc.Pause, orc.Resume, orc.Stop, orc.Kill, orc.Warn, orc.Isolate, orc.Rejoin, orc.Evict)
ACTIONS = st.one_of(
    *(st.builds(kind, **ABOUT) for kind in ON_VM),
    st.builds(orc.CapCpu, share=st.none() | st.floats(0.01, 1), **ABOUT),
    st.builds(orc.SetMemory, memory=st.none() | st.integers(1, 1 << 30).map(lambda pages: 4096 * pages), **ABOUT),
    st.builds(orc.Throttle, limit=LIMITS, meter=METERS, **ABOUT),
    st.builds(orc.Throttle, limit=LIMITS, tenant=NAMES),
    st.builds(orc.SetLimit, limit=st.none() | LIMITS, meter=METERS, vcpu=st.none() | st.integers(0, 7), **ABOUT),
    st.builds(orc.Unthrottle, tenant=st.none() | NAMES, meter=METERS),
    st.builds(orc.Reload, policies=st.dictionaries(NAMES, st.sampled_from(["new", "gone"]))),
)
SPECS = st.builds(
    orc.VmSpec,
    name=NAMES,
    boot=st.builds(orc.FlatImage, code=st.binary(min_size=1, max_size=20), mode=st.sampled_from([16, 32, 64])),
    memory=st.just(1 << 20),
    vcpus=st.integers(1, 4),
    tenant=st.none() | NAMES,
    limit=st.none() | LIMITS,
    regions=st.just((orc.MemoryRegion(address=1 << 24, size=4096, contents=b"\x00\xff"),)) | st.just(()),
    devices=st.lists(st.sampled_from([orc.Serial(), orc.DebugConsole(), orc.ExitPort(0x510)]), max_size=2, unique=True),
    restart=st.sampled_from(["never", "on-failure"]),
    labels=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
OUTCOMES = st.one_of(
    st.just(orc.Halted()),
    st.builds(orc.Shutdown, code=st.none() | st.integers(0, 255)),
    st.builds(orc.Stopped, st.text(max_size=9)),
    st.builds(orc.Failed, TEXTS, st.dictionaries(NAMES, st.integers(0, 2**64 - 1)), st.none() | st.integers(0, 7)),
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(encode(value), allow_nan=False))


@given(ACTIONS)
def test_actions_come_back_as_they_were(action):
    assert decode(orc.Action, through_json(action)) == action


@given(SPECS)
def test_specs_come_back_as_they_were(spec):
    assert decode(orc.VmSpec, through_json(spec)) == spec
    assert from_document(orc.VmSpec, json.loads(json.dumps(to_document(spec)))) == spec


@given(OUTCOMES)
def test_outcomes_come_back_as_they_were(outcome):
    assert decode(orc.Outcome, through_json(outcome)) == outcome


EXITS = [kind for kind in TAGGED.values() if issubclass(kind, exits.Exit)]


@pytest.mark.parametrize("kind", EXITS, ids=lambda kind: kind.__name__)
def test_exits_come_back_as_they_were(kind):
    examples = {"str": "a", "bool": True, "bytes": b"\x01", "tuple[int, ...]": (1, 2)}
    fields = [field for field in attrs.fields(kind) if field.init and field.default is attrs.NOTHING]
    exit = kind(**{field.alias: examples.get(str(field.type), 1) for field in fields})
    assert decode(kind, through_json(exit)) == exit


async def test_statistics_and_facts_come_back_as_they_were(autojump_clock):
    async with orc.open_fleet(backend="scripted", limit=orc.Limit(rate=5)) as fleet:
        vm = await fleet.launch(orc.VmSpec(name="a", boot=orc.FlatImage(code=b"\xf4")))
        told = vm.statistics()
        assert decode(orc.VmStatistics, through_json(told)) == told
        assert decode(orc.FleetStatistics, through_json(fleet.statistics())) == fleet.statistics()


VM: dict[str, Any] = {"name": "a", "boot": {"kind": "FlatImage", "code": "9A=="}}


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (orc.Limit, {"rate": "5"}, "rate='5': must be a number"),
        (orc.Limit, {"rate": True}, "rate=true: must be a number"),
        (orc.Limit, {"rate": -5.0}, "rate=-5.0"),
        (orc.Limit, {"rat": 5.0}, "rat: no such key; there are: rate, burst, max_delay; did you mean 'rate'"),
        (orc.Limit, {}, "rate: is missing"),
        (orc.Limit, {"rate": 10**400}, "too large"),
        (orc.Limit, [], "value: a list: must be an object"),
        (orc.Limit, {1: 2}, "must be an object"),
        (orc.Action, {"kind": "Explode"}, "kind='Explode': must be one of CapCpu, Evict"),
        (orc.Action, {"vm": "a"}, "must be an object whose 'kind'"),
        (orc.Action, {"kind": "Throttle", "vm": "a", "limit": {"rate": -1}}, "limit.rate=-1"),
        (orc.Action, {"kind": "Throttle", "limit": {"rate": 1}, "meter": "cows"}, "meter"),
        (orc.Action, {"kind": "Pause", "vm": 5}, "vm=5: must be a text"),
        (orc.VmSpec, VM | {"boot": {"kind": "FlatImage", "code": "!!"}}, "boot.code='!!': must be bytes in base64"),
        (orc.VmSpec, VM | {"devices": [{"kind": "Sound"}]}, r"devices\[0\].kind='Sound'"),
        (orc.VmSpec, VM | {"regions": [{"address": 1, "size": 4096}]}, r"regions\[0\].address=1: must be a m"),
        (
            orc.VmSpec,
            VM | {"boot": {"kind": "FlatImage", "code": "9A==", "mode": 8}},
            "boot.mode=8: must be one of 16, 32, 64",
        ),
        (
            orc.VmSpec,
            VM | {"boot": {"kind": "FlatImage", "code": "9A==", "mode": 16**6000}},
            "boot.mode=a number beyond 64 bits: must be",
        ),
        (orc.VmSpec, VM | {"vcpus": 16**6000}, "vcpus"),
        (orc.VmSpec, VM | {"labels": {"a": 1}}, "labels.a=1: must be a text"),
        (orc.VmSpec, VM | {"boot": {"kind": "Serial", "code": "9A=="}}, "boot.kind='Serial': must be one of FlatImage"),
        (orc.VmSpec, VM | {"boot": {"code": "9A=="}}, "boot.kind=None: must be one of FlatImage"),
        (orc.VmSpec, VM | {"memory": {"kind": "Memory", "size": 5}}, "memory.size=5: must be from 4096"),
        (orc.VmSpec, VM | {"memory": {"size": 4096, "pages": 1}}, "memory"),
        (orc.VmSpec, VM | {"memory": {"size": 4096, "backing": "file"}}, "^memory.path=None: must be given [^;]*$"),
        (orc.Memory, {"size": 4096, "backing": "file", "path": None}, "^path=None: must be given [^;]*$"),
        (orc.VmSpec, VM | {"irqchip": "spilt"}, "irqchip='spilt': must be one of 'full', 'split'; did you mean"),
        (orc.VmSpec, VM | {"irqchip": 1}, "irqchip=1: must be true or false"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(kind, data, message):
    with pytest.raises(orc.SpecError, match=message):
        decode(kind, data)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be an object"),
        ({"kind": "Limit", "rate": 1.0}, "orchestra: is missing: the version of the format; `to_document` writes 1"),
        ({"orchestra": None, "kind": "Limit"}, "orchestra=None: must be the version"),
        ({"orchestra": 2, "kind": "Limit", "rate": 1.0}, "orchestra=2: must be the version of the format, from 1 to 1"),
        ({"orchestra": 1, "kind": "Tenant", "rate": 1.0}, "kind='Tenant': must be 'Limit'"),
    ],
)
def test_a_document_of_another_kind_or_version_is_refused(document, message):
    with pytest.raises(orc.SpecError, match=message):
        from_document(orc.Limit, document)


class Shape:
    """An open set: of whatever classes there are."""

    @classmethod
    def kinds(cls) -> dict[str, type]:
        return {one.__name__: one for one in cls.__subclasses__()}


@attrs.frozen
class Round(Shape):
    radius: float = 1.0


@attrs.frozen
class Drawing:
    shapes: tuple[Shape, ...]


def test_classes_of_an_open_set_carry_their_names():
    drawing = Drawing((Round(2.0), Round()))
    assert through_json(drawing)["shapes"][0] == {"kind": "Round", "radius": 2.0}
    assert decode(Drawing, through_json(drawing)) == drawing
    assert decode(Drawing, {"shapes": ["Round"]}) == Drawing((Round(),))
    with pytest.raises(orc.CodecError, match=r"shapes\[0\].kind='Roud': must be one of Round, or of .* 'Round'"):
        decode(Drawing, {"shapes": [{"kind": "Roud"}]})
    with pytest.raises(orc.CodecError, match=r"shapes\[0\].kind=None: must be one of Round"):
        decode(Drawing, {"shapes": [{"radius": 1.0}]})


def test_mistakes_without_end_are_told_up_to_a_bound():
    with pytest.raises(orc.CodecError) as caught:
        decode(orc.Limit, {f"key {n}": n for n in range(100_000)})
    assert len(caught.value.mistakes) == 100
    with pytest.raises(orc.CodecError) as caught:
        decode(tuple[int, ...], ["x"] * 100_000)
    assert len(caught.value.mistakes) == 100


KEYS = TEXTS | st.sampled_from(["kind", "rate", "vm", "limit", "boot"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.sampled_from([orc.Action, orc.Outcome, orc.VmSpec, orc.Limit, orc.Tenant]))
def test_whatever_comes_is_a_value_or_a_spec_error(data, kind):
    try:
        value = decode(kind, data)
    except orc.SpecError:
        return
    assert decode(kind, encode(value)) == value


def test_what_is_nested_too_deep_is_refused_both_ways():
    deep: Any = 1
    for _ in range(DEPTH + 2):
        deep = [deep]
    with pytest.raises(orc.SpecError, match="nested deeper"):
        encode(deep)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": [object()]}])
def test_what_json_has_no_form_for_is_refused(value):
    with pytest.raises(orc.SpecError):
        encode(value)


def test_numbers_without_end_have_words():
    assert encode([math.inf, -math.inf]) == ["inf", "-inf"]
    assert decode(tuple[float, ...], ["inf", "-inf"]) == (math.inf, -math.inf)
