"""The config of a run, read from YAML and checked. Nothing here imports torch or another subpackage."""
