"""Builds the C core with cffi (API mode, one abi3 extension). `setup.py` names it; by hand: ``python _build.py``."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = [
    "bucket.c",
    "budget.c",
    "gate.c",
    "ring.c",
    "channel.c",
    "vcpu.c",
    "stock.c",
    "runner.c",
    "priority.c",
    "signal.c",
    "thread.c",
    "bus.c",
    "access.c",
    "ask.c",
    "console.c",
    "interrupts.c",
    "ports.c",
    "uart.c",
    "guest_memory.c",
    "virtqueue.c",
    "virtio.c",
    "virtio_registers.c",
    "virtio_state.c",
    "virtio_pci.c",
    "io.c",
    "io_rest.c",
    "pci.c",
    "virtio_rng.c",
    "virtio_console.c",
    "virtio_console_control.c",
    "virtio_balloon.c",
    "uring.c",
    "store.c",
    "file.c",
    "overlay.c",
    "virtio_blk.c",
    "virtio_lent.c",
    "spawn.c",
    "kvm.c",
    "build.c",
    "builder.c",
    "cap.c",
    "dirty.c",
    "dirty_ring.c",
    "names.c",
    "decode.c",
    "unicorn.c",
    "emulate.c",
    "emulate_engine.c",
    "emulate_memory.c",
    "emulate_sites.c",
    "emulate_meet.c",
    "emulate_locks.c",
    "emulate_ports.c",
    "emulate_attempt.c",
    "emulate_replay.c",
    "emulate_exits.c",
    "probe.c",
    "profile.c",
    "profile_unicorn.c",
]
HEADERS = [
    "orc.h",
    "core.h",
    "budget.h",
    "dirty.h",
    "decode.h",
    "unicorn.h",
    "emulate.h",
    "interpreter.h",
    "virtqueue.h",
    "virtio.h",
    "virtio_rules.h",
    "virtio_console.h",
    "uring.h",
    "store.h",
    "pci.h",
    "cdef.h",
]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "orchestra.native._core",
    "".join(f'#include "{name}.h"\n' for name in ("orc", "decode", "interpreter", "virtio", "pci", "store")),
    sources=[f"orchestra/native/{name}" for name in SOURCES],
    depends=[f"orchestra/native/{name}" for name in HEADERS],
    include_dirs=["orchestra/native"],
    libraries=["dl"],  # dlopen was not part of libc before glibc 2.34
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    define_macros=[("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
