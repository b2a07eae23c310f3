"""The benchmark of the arena kernels: `python -m kernels.bench --json OUT`."""
