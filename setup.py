"""What pyproject.toml can't say yet: the C core, built by cffi against the limited API, so that one wheel fits
every Python from 3.11 on. Everything else stands in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["orchestra/native/_build.py:ffibuilder"],
    # The tag must agree with Py_LIMITED_API in orchestra/native/_build.py.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
