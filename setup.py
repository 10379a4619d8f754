"""What pyproject.toml can't say yet: the C core, built by cffi against the limited API, so that one wheel fits
every Python from 3.11 on, and that what builds it stays out of the wheel. Everything else stands in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class Modules(build_py):
    """All but orchestra/native/_build.py, which is of no use without the C sources."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "_build"]


setup(
    cffi_modules=["orchestra/native/_build.py:ffibuilder"],
    cmdclass={"build_py": Modules},
    # The tag must agree with Py_LIMITED_API in orchestra/native/_build.py.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
