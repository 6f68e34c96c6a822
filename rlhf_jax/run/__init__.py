"""Running a program: files, stages and what else an experiment needs that is no mathematics."""
