"""Several stages in one process, to import and join once: the arguments are a JSON list of commands."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from rlhf_jax.run.cli import main

if __name__ == "__main__":
    commands, *flags = sys.argv[1:]
    for _, script, *arguments in json.loads(commands):
        try:
            main(import_module(f"experiments.{Path(script).stem}").run, argv=[*arguments, *flags])
        except SystemExit as ended:
            if ended.code:
                raise
