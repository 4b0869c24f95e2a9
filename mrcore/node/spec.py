"""What a daemon of a node is told of itself: a JSON file that the launcher, or a deploy, has written."""

from __future__ import annotations

import sys
from pathlib import Path

from mrcore.messages.kinds import decode
from mrcore.messages.nodes import Spec
from mrcore.wire.tls import Pki


def read_spec(file: str) -> Spec:
    """Return the spec in a file. Ends the process with one line, which names the file, when it cannot be read."""
    try:
        return decode(Spec, Path(file).read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"mrcore: the spec {file} of this daemon cannot be read: {error}: deploy, or start, it again")


def pki_of(spec: Spec) -> Pki:
    """Return where the node's certificate and the list of members lie."""
    return Pki(Path(spec.pki_dir), "node", Path(spec.members_file))
