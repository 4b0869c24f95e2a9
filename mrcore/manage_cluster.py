"""The former place of `mrcore.cluster.manage_cluster`; `import mrcore` has all that users need."""

from mrcore.cluster.manage_cluster import ManageCluster as ManageCluster
