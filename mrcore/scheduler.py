"""The former place of `mrcore.queue.scheduler`; `import mrcore` has all that users need."""

from mrcore.queue.runner import Runner as Runner
from mrcore.queue.scheduler import Scheduler as Scheduler
