"""How daemons come up and end: `launcher_of` chooses between this machine's own and deployed ones."""

from mrcore.launchers.launcher import Launcher
from mrcore.settings.config import Settings


def launcher_of(settings: Settings) -> Launcher:
    """Return what starts and stops the daemons of this cluster."""
    if settings.local:
        from mrcore.launchers import local

        return local
    from mrcore.launchers import ssh  # only here: it loads fabric

    return ssh
