"""The former place of `mrcore.node.node_agent`, which units of earlier releases start."""

import sys

from mrcore.node.node_agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
