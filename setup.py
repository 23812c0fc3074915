"""Two packages from two roots: the trainer from the top level, the kernels from kernels/."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tcopd_fast", "tcopd_fast.*"]),
        *find_packages("kernels", include=["tcopd_kernels", "tcopd_kernels.*"]),
    ],
    package_dir={"tcopd_fast": "tcopd_fast", "tcopd_kernels": "kernels/tcopd_kernels"},
    package_data={
        "tcopd_fast": ["py.typed", "miniature/assets/**/*", "miniature/*.yaml"],
        "tcopd_kernels": ["py.typed"],
    },
)
