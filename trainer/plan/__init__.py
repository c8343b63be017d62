"""Before a run: grids of runs, memory, time."""
