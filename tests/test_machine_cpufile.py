"""CPU templates in files: read strictly, each mistake with file, line and key."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from cputemplates import cpu_templates
from orchestra.machine.cpufile import parse_cpu_template
from orchestra.toml import Mistake, TomlError

GOOD = """\
name = "web"
base = "x86-64-v3"
features = ["aes", "pclmulqdq"]
optional = ["rdrand"]
hidden = ["fma"]

[[cpuid]]
leaf = 0x1
eax = "0b0000_0110_0110_1111_0000_0101_1000"    # family, model and stepping

[[msrs]]
number = 0x10a
bits = "0b1xx"
"""


def test_a_file_says_what_a_template_says(tmp_path):
    (tmp_path / "web.toml").write_text(GOOD)
    template = orc.load_cpu_template(tmp_path / "web.toml")
    assert template == orc.CpuTemplate(
        name="web",
        base="x86-64-v3",
        features=("aes", "pclmulqdq"),
        optional=("rdrand",),
        hidden=("fma",),
        cpuid=(orc.CpuidBits(leaf=1, eax="0b0000_0110_0110_1111_0000_0101_1000"),),
        msrs=(orc.MsrBits(number=0x10A, bits="0b1xx"),),
    )
    assert {"aes", "avx2"} <= template.rules().features
    assert "fma" in template.rules().hidden


def test_the_example_of_the_guide_is_a_template():
    template = orc.load_cpu_template(Path(__file__).parents[1] / "examples" / "cpus" / "web.toml")
    assert {"aes", "avx2"} <= template.rules().features
    assert template.rules().others == "hidden"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hidden", "hiden", r"web.toml:5: hiden: .*hidden"),
        ("leaf = 0x1", "leaf = 0xb", r"web.toml:8: cpuid\[0\].leaf: 0xb: orchestra makes it itself"),
        ("leaf = 0x1\n", "", r"web.toml:7: cpuid\[0\].leaf: is missing"),
        ("leaf = 0x1", 'leaf = "0x1"', r"web.toml:8: cpuid\[0\].leaf: '0x1': must be a whole number"),
        ("eax =", "rax =", r"web.toml:9: cpuid\[0\].rax: .*eax"),
        ('"0b1xx"', '"1xx"', r"web.toml:13: msrs\[0\].bits: '1xx': must be '0b' and up to 64 digits"),
        ("0x10a", "0x10b", r"web.toml:12: msrs\[0\].number: 267: must be an MSR that templates are for"),
        ('"x86-64-v3"', '"x86-64-v9"', r"web.toml:2: base: 'x86-64-v9': must be a built-in template"),
        ('"aes"', '"aez"', r"web.toml:3: features: 'aez': no such CPU feature: .*did you mean"),
        ('["fma"]', "[7]", r"web.toml:5: hidden\[0\]: 7: must be a text"),
        ('name = "web"\n', "", r"web.toml: name: is missing"),
        ("[[msrs]]", "[[msrs]", r"web.toml:11: "),
    ],
)
def test_a_mistake_has_file_line_key_and_remedy(tmp_path, monkeypatch, old, new, said):
    monkeypatch.chdir(tmp_path)
    Path("web.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(TomlError) as caught:
        orc.load_cpu_template("web.toml")
    assert re.search(said, "\n".join(caught.value.lines)), caught.value.lines


def test_all_mistakes_are_said_at_once():
    text = GOOD.replace("hidden", "hiden").replace("0x10a", "0x10b").replace("eax", "rax")
    with pytest.raises(TomlError) as caught:
        parse_cpu_template(text)
    assert {"hiden", "cpuid[0].rax", "msrs[0].number"} <= {one.key for one in caught.value.mistakes}


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "large"])
def test_a_file_that_is_no_template_is_refused_without_a_wait(tmp_path, kind):
    path = tmp_path / "cpu.toml"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "large":
            path.write_bytes(b"#" * (65 << 10))
    said = {"missing": "can't be opened", "folder": "directory", "pipe": "no regular file", "empty": "is empty"}
    with pytest.raises(orc.FileError, match=rf"cpu.toml: cpu: .*{said.get(kind, 'which no CPU template needs')}"):
        orc.load_cpu_template(path)


def refused_or_read(text: str | bytes) -> None:
    mistakes: tuple[Mistake, ...] | None = None
    try:
        parse_cpu_template(text)
    except TomlError as error:
        mistakes = error.mistakes
    assert mistakes is None or mistakes


@given(st.text(max_size=200))
def test_any_text_is_a_template_or_a_mistake(text):
    refused_or_read(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_template_or_a_mistake(data):
    refused_or_read(data)


VALUES = st.recursive(
    st.one_of(st.integers(-(1 << 70), 1 << 70), st.booleans(), st.sampled_from(["avx", "0b1", "host", "x" * 300])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
KEYS = ("name", "base", "features", "optional", "hidden", "others", "cpuid", "msrs", "leaf", "bits", "more")


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), st.sampled_from(["", "[[cpuid]]\n", "[[msrs]]\n"]))
def test_any_values_under_any_keys_are_a_template_or_mistakes_with_their_keys(values, table):
    def written(value: object) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(written, value))}]"
        return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')

    text = f"{table}{''.join(f'{key} = {written(value)}' + chr(10) for key, value in values.items())}"
    refused_or_read(text)


@given(cpu_templates())
def test_what_a_template_says_can_be_written_down_and_read_again(template):
    lists = "".join(f"{field} = {[*getattr(template, field)]!r}\n" for field in ("features", "optional", "hidden"))
    others = "" if template.others is None else f'others = "{template.others}"\n'
    text = f'name = "{template.name}"\nbase = "{template.base}"\n{lists}{others}'
    assert parse_cpu_template(text) == template


def test_a_template_of_a_great_many_leaves_is_refused_at_once():
    text = 'name = "many"\n' + "".join(f'[[cpuid]]\nleaf={n}\neax="0b1"\n' for n in range(0x100, 0x900))
    assert len(text) < 64 << 10
    with pytest.raises(TomlError, match=r"cpuid.*at most 64 leaves"):
        parse_cpu_template(text)


# ---- launched


async def test_a_launch_reads_the_file_and_the_vm_keeps_the_template(tmp_path):
    path = tmp_path / "cpu.toml"
    path.write_text('name = "no-avx"\nhidden = ["avx"]\n')
    async with orc.open_fleet(backend="scripted") as fleet:
        spec = orc.VmSpec(name="a", boot=orc.FlatImage(code=b"\xf4"), cpu=str(path))
        vm = await fleet.launch(spec, paused=True)
        assert vm.spec.cpu == orc.CpuTemplate(name="no-avx", hidden=("avx",))
        path.write_text("name = 7\n")
        with pytest.raises(TomlError, match=r"cpu.toml: 1 mistake\n  line 1: name: 7: must be a text"):
            await fleet.launch(orc.VmSpec(name="b", boot=spec.boot, cpu=str(path)))
        assert list(fleet.vms) == ["a"]


async def test_the_emulated_backend_shows_its_own_cpu_alone():
    try:
        backend = orc.EmulatedBackend()
    except orc.BackendUnavailable as error:
        pytest.skip(str(error))
    async with orc.open_fleet(backend=backend, bus_locks="auto") as fleet:
        spec = orc.VmSpec(name="a", boot=orc.FlatImage(code=b"\xf4"), cpu="x86-64-v2")
        with pytest.raises(orc.SpecError, match=r"cpu: the emulated backend has one CPU.*backend='kvm' can"):
            await fleet.launch(spec)
    backend.close()
