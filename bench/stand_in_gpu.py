"""The host's half of a GPU without the GPU: Triton compiles, loads and launches, and nothing runs.

`install` builds a CUDA driver that only checks and counts (stand_in_libcuda.c), gives it to Triton, and lets the
kernels package take CPU tensors for CUDA ones. Everything up to the launch is then real: argument types as Triton
specialises them in a call (a size of 1 becomes a constant, multiples of 16 are marked), compilation to machine code for
the chosen architecture, tensor maps, the choice among tiles, the launcher itself. What the kernels would have written
is what `filled` says. For a process of its own: nothing is undone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("stand_in_libcuda.c")
# Capability -> (multiprocessors, bytes of shared memory a block may take)
LIMITS = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}
PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class StandIn:
    """The driver that Triton talks to: what was launched, and what ptxas said of each kernel that was compiled.

    functions: module and name of every kernel that was called.
    compiled: call, kernel, registers and spilled bytes (stores and loads) per thread of every compilation heard.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.stand_in_launch_name.restype = ctypes.c_char_p
        self.functions: set[str] = set()
        self.compiled: list[dict[str, Any]] = []

    def launches(self) -> list[dict[str, Any]]:
        """kernel, programs, threads per program and bytes of dynamic shared memory of every launch so far."""
        fields = ("programs", "threads", "shared")
        return [
            {"kernel": self._library.stand_in_launch_name(i).decode()}
            | {name: getattr(self._library, f"stand_in_launch_{name}")(i) for name in fields}
            for i in range(self._library.stand_in_launch_count())
        ]

    @contextlib.contextmanager
    def listening(self, call: str) -> Iterator[None]:
        """Hears the compiler out; what it compiles inside is put down to `call`."""
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                yield
        finally:
            for m in PTXAS.finditer(log.getvalue()):
                spilled = int(m["stores"]) + int(m["loads"])
                found = {"kernel": m["kernel"], "registers": int(m["registers"]), "spill_bytes": spilled}
                self.compiled.append({"call": call, **found})


def install(capability: int) -> StandIn:
    """Makes Triton and tcopd_kernels in this process believe in a GPU of that capability.

    Raises RuntimeError if Triton has been imported for its interpreter, or without a C compiler.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: the stand-in needs Triton's compiler, unset it")
    folder = Path(tempfile.mkdtemp(prefix="stand_in_"))
    os.environ |= {
        "STAND_IN_CAPABILITY": str(capability),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TCOPD_KERNELS_CACHE": str(folder / "tiles"),
    }
    stand_in = StandIn(_build(folder))
    _give_to_triton(capability, stand_in.functions)
    _give_to_kernels(capability)
    return stand_in


def _build(folder: Path) -> ctypes.CDLL:
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", str(library)]
    subprocess.run([compiler, *flags, str(SOURCE)], check=True)
    # Loaded under the name by which Triton's own libraries look for the driver.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _give_to_triton(capability: int, functions: set[str]) -> None:
    import triton
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.jit import JITFunction

    driver = CudaDriver()
    driver.get_device_capability = lambda *_: divmod(capability, 10)
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda _: None
    driver.get_current_stream = lambda _: 0
    triton.runtime.driver.set_active(driver)
    knobs.nvidia.dump_ptxas_log = True
    run = JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        functions.add(f"{self.fn.__module__}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    JITFunction.run = noted


def _give_to_kernels(capability: int) -> None:
    """CPU tensors pass for CUDA ones where the package asks; tiles are compiled and launched, and not timed."""
    import tcopd_kernels
    from tcopd_kernels import _backend, _triton_common, _triton_tiles

    for module in pkgutil.iter_modules(tcopd_kernels.__path__, "tcopd_kernels."):
        if not module.ispkg:
            importlib.import_module(module.name)
    processors, shared = LIMITS[capability]

    def tma_usable(*matrices: torch.Tensor) -> bool:
        return capability >= 90 and all(
            m.data_ptr() % 16 == 0
            and m.stride(1) == 1
            and m.stride(0) >= m.shape[1]
            and m.stride(0) * m.itemsize % 16 == 0
            for m in matrices
        )

    stand_ins = [
        (_triton_common.tma_usable, tma_usable),
        (_triton_tiles.device_limits, lambda _: (capability, processors, shared)),
        (_triton_tiles.measure_ms, lambda _: 0.0),
        (_backend._triton_obstacle, lambda _: None),
    ]
    modules = [module for name, module in sys.modules.items() if name.startswith("tcopd_kernels")]
    for module in modules:
        for name, value in list(vars(module).items()):
            own = next((new for old, new in stand_ins if value is old), None)
            if own is not None:
                setattr(module, name, own)
    torch.cuda.get_device_name = lambda *_: f"stand-in of sm_{capability}"
    torch.cuda.is_current_stream_capturing = lambda: False


@contextlib.contextmanager
def filled(value: float) -> Iterator[None]:
    """Memory that nothing has written holds this value, so that what follows a kernel is the same in every run."""
    empty = torch.empty

    @functools.wraps(empty)
    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(value)

    torch.empty = full
    try:
        yield
    finally:
        torch.empty = empty
