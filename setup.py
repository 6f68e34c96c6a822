"""Puts the programs and their configs into the wheel: there is one copy of them, in the
checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROGRAMS = ("experiments", "configs")
"""Folders that a wheel holds below ``rlhf_jax/programs``, where `rlhf_jax.run.programs` finds
them."""


class BuildWithPrograms(build_py):
    """The modules, and beside them the programs; an editable install uses those of the checkout."""

    def run(self) -> None:
        """Copies what is built."""
        super().run()
        if self.editable_mode:
            return
        for folder in PROGRAMS:
            target = Path(self.build_lib, "rlhf_jax", "programs", folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithPrograms})
