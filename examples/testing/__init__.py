"""A small control plane, and how it is tested with orchestra.testing: `pytest examples/testing`."""
