"""The settings of a deployed cluster with two nodes."""

from __future__ import annotations

DEPLOYED = """
cluster_name: office
home: {home}
nodes:
  - {{name: alpha, address: 10.0.0.1, servers: 2, compute_dir: /data/mrcore}}
  - {{name: beta, address: 10.0.0.2, servers: 3, compute_dir: /data/mrcore}}
"""
