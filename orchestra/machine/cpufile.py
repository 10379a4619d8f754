"""A CPU template in a file: TOML whose keys are the fields of `CpuTemplate`, checked as a whole."""

from __future__ import annotations

import os
from typing import Final

import attrs
import trio

from .. import toml
from ..model.cpu import CpuTemplate, is_template_file
from ..model.spec import VmSpec
from .boot.files import BootFile
from .workers import at_length

__all__ = ["load_cpu_template", "parse_cpu_template", "with_cpu_read"]

MOST: Final = 64 << 10
"""Bytes of a file. A template that names every feature and leaf has a tenth of that."""


def load_cpu_template(path: str | os.PathLike[str]) -> CpuTemplate:
    """Read a CPU template from a TOML file. Its keys are the parameters of `CpuTemplate`.

    Raises:
        FileError: the file can't be read, or its content is not valid. Then it is a TomlError, with all mistakes, each
            with its line and key.
    """
    with BootFile("cpu", os.fspath(path)) as file:
        if file.size > MOST:
            raise file.error(f"has {file.size} bytes, which no CPU template needs", f"name a file of at most {MOST}")
        return parse_cpu_template(file.read(0, file.size), file.path)


def parse_cpu_template(text: str | bytes, file: str = "template") -> CpuTemplate:
    """Read a CPU template from text. `file` is the name that errors give the text.

    Raises:
        TomlError: as `load_cpu_template`.
    """
    return toml.structure(text, CpuTemplate, file)


async def with_cpu_read(spec: VmSpec) -> VmSpec:
    """The spec, with the template itself where it names a file.

    Raises:
        FileError: as `load_cpu_template`.
    """
    if isinstance(spec.cpu, CpuTemplate) or not is_template_file(spec.cpu):
        return spec
    template = await trio.to_thread.run_sync(at_length, lambda: load_cpu_template(str(spec.cpu)))
    return attrs.evolve(spec, cpu=template)
