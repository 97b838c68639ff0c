"""Memory of a slot that the host refuses under a running guest."""

from __future__ import annotations

import ctypes
import errno
import mmap

from guestmem import Host
from guestmem.cpu.boot import real_mode
from guestmem.kvm.exits import HltExit, MemoryFaultExit

PAGE = 4096


def test_it_is_efault_and_the_guest_goes_on_when_it_is_back() -> None:
    with Host(memory=64 << 20) as host:
        vm = host.create_vm()
        ram = host.anonymous(1 << 20)
        vm.set_memory_region(slot=0, gpa=0, size=1 << 20, memory=ram)
        ram[0x1000:0x1005] = b"\xa3\x10\x50\xf4\xf4"  # mov [0x5010], ax; hlt
        vcpu = vm.create_vcpu()
        start = real_mode(0x1000)
        vcpu.vcpu.engine.set_sregs(start.sregs)
        vcpu.vcpu.engine.set_regs(start.regs)
        assert isinstance(vcpu.run(), HltExit)
        page = vm.kvm.stage2.translate(0x5000, True, None)
        assert page is not None
        protect = ctypes.CDLL(None).mprotect
        assert protect(ctypes.c_void_p(page.hva), PAGE, mmap.PROT_READ) == 0
        vcpu.vcpu.engine.set_regs(start.regs)
        exit_ = vcpu.run()
        assert isinstance(exit_, MemoryFaultExit)
        assert (exit_.gpa, exit_.size, exit_.private) == (0x5000, PAGE, False)
        assert (exit_.refusal.errno, exit_.refusal.rule) == (errno.EFAULT, "user.page")
        assert protect(ctypes.c_void_p(page.hva), PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        assert isinstance(vcpu.run(), HltExit)
