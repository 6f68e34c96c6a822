"""Running a program: files, stages and everything else of an experiment except its mathematics."""
