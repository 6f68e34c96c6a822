"""The programs: each stage as a file with ``run(config, workdir)``; `instructgpt` runs them all."""
