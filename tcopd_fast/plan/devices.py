"""Devices: how much memory and how fast, from presets, options and words like 80GB."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from tcopd_fast.config import nearest
from tcopd_fast.errors import UserError

GB = 10**9
UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Speed:
    """Peak figures of one GPU and the shares of them that a run is assumed to reach.

    tflops: dense bfloat16, 10¹² FLOP/s. hbm, pcie, interconnect: 10⁹ bytes/s, the last two in one direction; pcie
    from host memory to the GPU, interconnect to the other GPUs.
    """

    tflops: float
    hbm: float
    pcie: float
    interconnect: float
    compute_share: float = 0.4
    hbm_share: float = 0.6
    link_share: float = 0.8

    @property
    def flops(self) -> float:
        """FLOP/s that a run is assumed to reach."""
        return self.tflops * 1e12 * self.compute_share

    def seconds(self, nbytes: float, link: str) -> float:
        """Time of moving bytes over `hbm`, `pcie` or `interconnect`."""
        share = self.hbm_share if link == "hbm" else self.link_share
        return nbytes / (getattr(self, link) * 1e9 * share)


# Data sheets of the SXM parts (L40S: PCIe card; its GPUs reach one another over PCIe alone).
GPUS = {
    "a100": Speed(tflops=312, hbm=2039, pcie=32, interconnect=300),
    "h100": Speed(tflops=989, hbm=3350, pcie=64, interconnect=450),
    "h200": Speed(tflops=989, hbm=4800, pcie=64, interconnect=450),
    "b200": Speed(tflops=2250, hbm=8000, pcie=64, interconnect=900),
    "l40s": Speed(tflops=362, hbm=864, pcie=32, interconnect=32),
}


@dataclass(frozen=True)
class Cluster:
    """ranks: GPUs, one process each. memory: bytes of one GPU. host_memory: of one machine, None when not given.

    on_cpu: the ranks are processes on a CPU, for comparison with measured runs.
    """

    ranks: int
    memory: int
    per_machine: int = 8
    host_memory: int | None = None
    on_cpu: bool = False

    @property
    def ranks_here(self) -> int:
        """Ranks that share one machine's memory."""
        return min(self.ranks, self.per_machine)


def parse_bytes(text: str, option: str) -> int:
    """`80GB` or `80GiB` in bytes. Raises UserError naming the option."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: not a size of memory; write a number and a unit, for example 80GB or 80GiB")
    return int(float(match[1]) * factor)


def speed_of(gpu: str, **overrides: float | None) -> Speed:
    """The preset named `gpu` with the fields that are not None replaced. Raises UserError for an unknown name."""
    if gpu.lower() not in GPUS:
        raise UserError(f"--gpu {gpu}: no such preset{nearest(gpu.lower(), GPUS)}; or give the figures by options")
    given = {name: value for name, value in overrides.items() if value is not None}
    assert given.keys() <= {field.name for field in fields(Speed)}
    return replace(GPUS[gpu.lower()], **given)
