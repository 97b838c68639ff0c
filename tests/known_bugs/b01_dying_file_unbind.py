"""B01, CVE-2025-40274: unbind leaves the binding of a file that is already dying to the file's release."""

from guestmem.check.mutants import mutant
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory import File


@mutant("B01", replaces="guestmem.kvm.context:KvmGmemContext.unbind", breaks={"S5", "S6"})
async def dying_file_unbind(self: KvmGmemContext, slot: MemorySlot) -> File | None:
    """`if file_is_dying: return` instead of erasing the binding."""
    if not self.file.get_unless_dying():
        return None
    async with self.inode.invalidate_lock.exclusive:
        self._erase(slot)
    return self.file
