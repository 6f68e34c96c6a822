"""Copies the programs and their configs into the wheel, from their one source in the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROGRAMS = ("experiments", "configs")
"""Folders that a wheel puts below ``rlhf_jax/programs``, where `rlhf_jax.run.programs` looks."""


class BuildWithPrograms(build_py):
    """Builds the modules and copies the programs beside them; an editable install needs no copy."""

    def run(self) -> None:
        """Builds the package, then copies the programs unless the install is editable."""
        super().run()
        if self.editable_mode:
            return
        for folder in PROGRAMS:
            target = Path(self.build_lib, "rlhf_jax", "programs", folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithPrograms})
