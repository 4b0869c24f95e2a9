"""mrcore: a Python MapReduce cluster that a small team can deploy, trust and understand.

What users import stands here; each name is loaded from its module at its first use, so that a daemon or a task, which
imports `mrcore` as well, loads nothing that it does not need.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrcore import task as task
    from mrcore.cluster.manage_cluster import ManageCluster as ManageCluster
    from mrcore.engine.disk_list import DiskList as DiskList
    from mrcore.engine.trial import try_job as try_job
    from mrcore.errors import ClusterFault as ClusterFault
    from mrcore.errors import InternalError as InternalError
    from mrcore.errors import JobFault as JobFault
    from mrcore.errors import MrcoreError as MrcoreError
    from mrcore.errors import TaskDied as TaskDied
    from mrcore.errors import UsageError as UsageError
    from mrcore.face.connection import Cluster as Cluster
    from mrcore.face.connection import connect as connect
    from mrcore.face.job import JobHandle as JobHandle
    from mrcore.queue.runner import Runner as Runner
    from mrcore.queue.scheduler import Scheduler as Scheduler
    from mrcore.settings.config import Settings as Settings
    from mrcore.settings.config import load_settings as load_settings
    from mrcore.transfer.file_transfer import FileTransfer as FileTransfer

__version__ = "1.0.0"
WIRE_VERSION = 3  # raised whenever orders, frames or the data channel change meaning

# A deployed cluster has each release in a folder of its own, of which a link names the one in force: what this process
# runs stays what it was when the link moves on.
_place = Path(__file__).resolve().parts
RELEASE = _place[_place.index("releases") + 1] if "releases" in _place else __version__
VERSIONS = {"version": __version__, "release": RELEASE, "wire_version": WIRE_VERSION}  # as daemons report them

_ERRORS = ("ClusterFault", "InternalError", "JobFault", "MrcoreError", "TaskDied", "UsageError")
_PLACES = dict.fromkeys(_ERRORS, "errors") | {
    "Cluster": "face.connection",
    "DiskList": "engine.disk_list",
    "FileTransfer": "transfer.file_transfer",
    "JobHandle": "face.job",
    "ManageCluster": "cluster.manage_cluster",
    "Runner": "queue.runner",
    "Scheduler": "queue.scheduler",
    "Settings": "settings.config",
    "connect": "face.connection",
    "load_settings": "settings.config",
    "try_job": "engine.trial",
}
__all__ = [*_PLACES, "__version__", "task"]


def __getattr__(name: str) -> Any:
    """Load one of the public names (PEP 562)."""
    if name == "task":
        return import_module("mrcore.task")
    if name not in _PLACES:
        raise AttributeError(f"module 'mrcore' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"mrcore.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
