"""mrcore: a Python MapReduce cluster that a small team can deploy, trust and understand."""

from pathlib import Path

__version__ = "1.0.0"
WIRE_VERSION = 1  # raised whenever orders, frames or the data channel change meaning

# A deployed cluster has each release in a folder of its own, of which a link names the one in force: what this process
# runs stays what it was when the link moves on.
_place = Path(__file__).resolve().parts
RELEASE = _place[_place.index("releases") + 1] if "releases" in _place else __version__
VERSIONS = {"version": __version__, "release": RELEASE, "wire_version": WIRE_VERSION}  # as daemons tell them
