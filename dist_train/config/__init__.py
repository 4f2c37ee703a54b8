"""The config: what a run is, read from YAML and checked. Nothing here imports torch or another room."""
