# cffi makes this module at build time and knows nothing of types.
from typing import Any

ffi: Any
lib: Any
