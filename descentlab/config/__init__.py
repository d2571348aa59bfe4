"""Settings: YAML 1.2, key=value overrides, grids and run ids. Nothing here imports torch."""
