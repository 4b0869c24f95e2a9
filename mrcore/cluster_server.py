"""The former place of `mrcore.node.cluster_server`, which units of earlier releases start."""

import sys

from mrcore.node.cluster_server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
