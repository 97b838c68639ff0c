"""B29, CVE-2026-31589: a callback runs through what has been freed meanwhile.

Upstream it was free_folio, read from a mapping that could be gone. Here it is the notification of a view: unregistering
does not wait for the calls that are on their way.
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Registration
from guestmem.memory.notifier import Users


@mutant("B29", replaces="guestmem.memory.notifier:Users.unregister", breaks={"S20", "S6", "S4"})
async def unregister_does_not_wait(self: Users, registration: Registration) -> None:
    """Off the list, and gone."""
    self.registrations.remove(registration)
