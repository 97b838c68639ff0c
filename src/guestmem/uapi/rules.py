"""Every rule by which guestmem refuses: what a caller broke, where the check stands, and where it comes from.

`order` is the position of the check within its call, as the kernel makes them; rules of one call with the same order
cannot both be broken. `levels` names the ABI levels that have the rule, "" for all. A test holds this table against the
places that raise: no rule without an entry, no entry without a rule, the same errno in both.

Marks of the sources: [M] merged in Linux, [P] proposed on the list, [I] inferred by us, [O] observed on Linux 6.18.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """`errnos` are names, since one rule may have another errno at another level."""

    name: str
    errnos: tuple[str, ...]
    call: str
    order: int
    text: str
    source: str
    levels: str = ""


_CREATE = "KVM_CREATE_GUEST_MEMFD"
_REGION = "KVM_SET_USER_MEMORY_REGION2"
_ATTRIBUTES = "KVM_SET_MEMORY_ATTRIBUTES"
_ATTRIBUTES2 = "KVM_SET_MEMORY_ATTRIBUTES2"
_FALLOCATE = "fallocate"
_MMAP = "mmap"
_PREFAULT = "KVM_PRE_FAULT_MEMORY"
_FAULT = "fault"
_LINK = "KVM_LINK_GUEST_MEMFD"
_MOVE = "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM"
_COPY = "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM"
_PRESERVE = "LIVEUPDATE_SESSION_PRESERVE_FD"
_RETRIEVE = "LIVEUPDATE_SESSION_RETRIEVE_FD"
_IN_PLACE = "v7.4 future"
_FUTURE = "future"
_CONVERT = "KVM_GMEM_CONVERT_SHARED"
_SNP_OP = "KVM_MEMORY_ENCRYPT_OP of SNP"
_TDX_OP = "KVM_MEMORY_ENCRYPT_OP of TDX"
_IOMMU = "/dev/iommu"
_IOMMU_MAP = "IOMMU_IOAS_MAP"
_VFIO = "VFIO device"
_DMA = "DMA"
_ROUTING = "KVM_SET_GSI_ROUTING"
_FILTER = "KVM_X86_SET_MSR_FILTER"
_DEBUG = "KVM_SET_GUEST_DEBUG"
_LEVEL = "ABI level file"

_TABLE = (
    # Any ioctl
    Rule("fd.not_open", ("EBADF",), "any", 1, "the descriptor is not open", "fdget() [O R51 R52]"),
    Rule("ioctl.other_mm", ("EIO",), "any", 2, "the VM was made in another address space", "kvm_vm_ioctl [O S4]"),
    Rule("ioctl.unknown", ("ENOTTY", "EINVAL"), "any", 3, "this file has no such ioctl", "uapi.md 2 [O K1 G44]"),
    Rule("ioctl.wrong_file", ("ENOTTY", "EINVAL"), "any", 3, "another kind of file has this ioctl", "kvm_main.c [M]"),
    Rule("ioctl.vm_type", ("ENOTTY",), "any", 3, "a VM of this type has no such ioctl", "x86.c mem_enc_ioctl [M]"),
    Rule("ioctl.not_built", ("ENOTTY", "EINVAL"), "any", 3, "an ioctl that the kernel of this level lacks", "[M]"),
    Rule("ioctl.argument", ("EINVAL",), "any", 5, "the argument is not one that this call takes", "kvm_main.c [M]"),
    Rule(
        "list.too_small", ("E2BIG",), "any", 6, "the caller's list has no room for what there is", "cpuid.c, x86.c [M]"
    ),
    Rule("list.too_long", ("E2BIG",), "any", 7, "the caller's list is longer than any can be", "cpuid.c, x86.c [M]"),
    Rule("wire.bad_request", ("EPROTO",), "any", 8, "no message that our shim sends", "docs/reference/wire.md [I]"),
    Rule("user.copy", ("EFAULT",), "any", 4, "the argument cannot be read or written", "copy_from_user [O N24 R64]"),
    Rule("ioctl.vm_dead", ("EIO",), "any", 2, "the VM's identity has moved to another struct kvm", "kvm->vm_dead [M]"),
    # A level that a user wrote
    Rule("level.not_found", ("ENOENT",), _LEVEL, 1, "there is no such level, and no such file", "--abi [I]"),
    Rule("level.syntax", ("EINVAL",), _LEVEL, 2, "the file is no TOML", "toml.io 1.0 [I]"),
    Rule("level.field", ("EINVAL",), _LEVEL, 3, "a key that levels do not have, or of another type", "[I]"),
    Rule("level.base", ("EINVAL",), _LEVEL, 4, "the base is none of the levels that come with guestmem", "[I]"),
    Rule("level.incomplete", ("EINVAL",), _LEVEL, 5, "without a base a level says everything", "[I]"),
    Rule("level.value", ("EINVAL",), _LEVEL, 6, "a number is none, or too large", "[I]"),
    Rule("level.unknown", ("EINVAL",), _LEVEL, 7, "a name that has nothing behind it here", "[I]"),
    Rule("level.same_number", ("EINVAL",), _LEVEL, 8, "two capabilities have one number", "[I]"),
    Rule("level.same_request", ("EINVAL",), _LEVEL, 9, "two ioctls have one number", "[I]"),
    Rule("level.same_bit", ("EINVAL",), _LEVEL, 10, "two flags have one bit", "[I]"),
    Rule("level.in_place_without_mmap", ("EINVAL",), _LEVEL, 11, "shared pages in place, and nobody maps them", "[I]"),
    Rule(
        "level.in_place_without_ioctl",
        ("EINVAL",),
        _LEVEL,
        12,
        "in_place or SET_MEMORY_ATTRIBUTES2 alone",
        "[I]",
    ),
    Rule("level.no_conversion", ("EINVAL",), _LEVEL, 13, "VM types with private memory, and no call converts", "[I]"),
    # KVM_CREATE_GUEST_MEMFD
    Rule("create.flags", ("EINVAL",), _CREATE, 2, "a flag that this VM may not have", "uapi.md 6 [M] [O N14]"),
    Rule("create.size", ("EINVAL",), _CREATE, 3, "size is zero, negative or no multiple of a page", "[M] [O N1]"),
    Rule("fd.limit", ("EMFILE",), _CREATE, 4, "no descriptor is free", "get_unused_fd_flags [O N34]"),
    Rule(
        "create.huge_size",
        ("EINVAL",),
        _CREATE,
        2,
        "a page size without HUGETLB, or none that is offered",
        "1G RFC v2 [P]",
        _FUTURE,
    ),
    Rule(
        "create.huge_unaligned",
        ("EINVAL",),
        _CREATE,
        3,
        "size is no multiple of the huge page",
        "uapi.md 14 [P]",
        _FUTURE,
    ),
    Rule(
        "create.reservation",
        ("ENOMEM",),
        _CREATE,
        8,
        "too few huge pages are free and not reserved",
        "uapi.md 14 [P]",
        _FUTURE,
    ),
    Rule(
        "create.cgroup",
        ("ENOMEM",),
        _CREATE,
        9,
        "the cgroup may not reserve as many huge pages",
        "hugetlb_cgroup.c [M]",
        _FUTURE,
    ),
    Rule("create.nomem", ("ENOMEM",), _CREATE, 5, "the view cannot be allocated", "kvm_gmem_create [M]"),
    # KVM_SET_USER_MEMORY_REGION2
    Rule(
        "region.v1_gmem", ("EINVAL",), "KVM_SET_USER_MEMORY_REGION", 2, "the older call has no guest_memfd", "[O R65]"
    ),
    Rule("region.slot_id", ("EINVAL",), _REGION, 2, "the slot number is too large", "uapi.md 7 [M] [O R1]"),
    Rule("region.flags", ("EINVAL",), _REGION, 3, "unknown flag, or GUEST_MEMFD with another one", "[M] [O R5-R9]"),
    Rule("region.unaligned", ("EINVAL",), _REGION, 4, "size or guest address is not page aligned", "[M] [O R10]"),
    Rule("region.userspace_addr", ("EINVAL",), _REGION, 5, "the host address is unaligned or no user's", "[O R14]"),
    Rule("region.offset", ("EINVAL",), _REGION, 6, "the file offset is unaligned, or offset + size wraps", "[O R20]"),
    Rule("region.address_space", ("EINVAL",), _REGION, 7, "there is no such address space", "[M] [O R2]"),
    Rule("region.gpa_wraps", ("EINVAL",), _REGION, 7, "guest address + size wraps", "[M] [O R39 R40]"),
    Rule("region.too_big", ("EINVAL",), _REGION, 7, "more than 2**31 - 1 pages", "KVM_MEM_MAX_NR_PAGES [O R38]"),
    Rule(
        "region.userfault_bitmap",
        ("EINVAL",),
        _REGION,
        7,
        "the bitmap of USERFAULT is not at a user's address",
        "KVM Userfault v3 [P]",
        _FUTURE,
    ),
    Rule("region.no_slot", ("EINVAL",), _REGION, 8, "the slot to delete does not exist", "[M] [O R49]"),
    Rule("region.gmem_immutable", ("EINVAL",), _REGION, 9, "a guest_memfd slot can only be deleted", "[M] [O R67]"),
    Rule("region.fixed_flags", ("EINVAL",), _REGION, 9, "READONLY and GUEST_MEMFD of a slot are fixed", "9935df5333aa"),
    Rule("region.resized", ("EINVAL",), _REGION, 9, "size and host address of a slot are fixed", "[M] [O R70]"),
    Rule("region.overlap", ("EEXIST",), _REGION, 10, "another slot has some of these frames", "[M] [O R76]"),
    Rule("region.nomem", ("ENOMEM",), _REGION, 11, "the slot cannot be allocated", "kvm_set_memory_region [M]"),
    Rule("bind.not_gmem", ("EINVAL",), _REGION, 13, "the descriptor is not a guest_memfd", "[M] [O R53-R56]"),
    Rule("bind.other_vm", ("EINVAL",), _REGION, 14, "the file is another VM's view", "kvm_gmem_bind [M] [O R58]"),
    Rule("bind.past_end", ("EINVAL",), _REGION, 15, "offset + size is beyond the file", "[M] [O R60]; B04 to v7.1"),
    Rule("bind.overlap", ("EINVAL", "EEXIST"), _REGION, 16, "pages are bound already; EEXIST from 7.2", "06ba195f136a"),
    Rule("bind.nomem", ("ENOMEM",), _REGION, 17, "the binding cannot be stored", "kvm_gmem_bind [M]"),
    Rule("region.unreachable", ("EINVAL",), _REGION, 18, "frames beyond MAXPHYADDR", "[M] [O R33]"),
    Rule("region.alias", ("EINVAL",), _REGION, 19, "the last frame has a TD's shared bit", "kvm_is_gfn_alias"),
    # KVM_SET_MEMORY_ATTRIBUTES
    Rule("attributes.flags", ("EINVAL",), _ATTRIBUTES, 2, "flags must be zero", "uapi.md 10 [M]"),
    Rule("attributes.attributes", ("EINVAL",), _ATTRIBUTES, 3, "an attribute that this VM does not have", "[M]"),
    Rule("attributes.range", ("EINVAL",), _ATTRIBUTES, 4, "size is zero, or address + size wraps", "[M]"),
    Rule("attributes.unaligned", ("EINVAL",), _ATTRIBUTES, 5, "address or size is not page aligned", "[M]"),
    Rule("attributes.nomem", ("ENOMEM",), _ATTRIBUTES, 6, "the attributes cannot be stored", "[M]"),
    # KVM_SET_MEMORY_ATTRIBUTES2 and conversion
    Rule("attributes2.off", ("ENOTTY",), _ATTRIBUTES2, 0, "this kernel does not convert in place", "uapi.md 13.1 [P]"),
    Rule("attributes2.flags", ("EINVAL",), _ATTRIBUTES2, 2, "flags must be zero", "v6 and later [P]", _IN_PLACE),
    Rule("attributes2.reserved", ("EINVAL",), _ATTRIBUTES2, 3, "a reserved word is not zero", "[P]", _IN_PLACE),
    Rule(
        "attributes2.no_private_memory",
        ("EINVAL",),
        _ATTRIBUTES2,
        4,
        "the VM's type has no private memory",
        "[P]",
        _IN_PLACE,
    ),
    Rule("attributes2.owner", ("EINVAL",), _ATTRIBUTES2, 4, "the view is not of the owner", "R27 [I]", "future"),
    Rule("attributes2.attributes", ("EINVAL",), _ATTRIBUTES2, 5, "an attribute besides PRIVATE", "[P]", _IN_PLACE),
    Rule("attributes2.range", ("EINVAL",), _ATTRIBUTES2, 6, "size is zero, or offset + size wraps", "[P]", _IN_PLACE),
    Rule("attributes2.unaligned", ("EINVAL",), _ATTRIBUTES2, 7, "offset or size is not page aligned", "[P]", _IN_PLACE),
    Rule("attributes2.past_end", ("EINVAL",), _ATTRIBUTES2, 8, "the range is not inside the file", "[P]", _IN_PLACE),
    Rule("convert.nomem", ("ENOMEM",), _ATTRIBUTES2, 9, "the new state cannot be stored", "[P]", _IN_PLACE),
    Rule("convert.busy", ("EAGAIN",), _ATTRIBUTES2, 10, "a page has references besides the file's", "[P]", _IN_PLACE),
    Rule("convert.bad_page", ("EHWPOISON",), _ATTRIBUTES2, 11, "a user could not unmap a page", "Q12 [I]", _IN_PLACE),
    # huge pages, and the conversion calls that came with them
    Rule(
        "split.vmemmap",
        ("ENOMEM",),
        _ATTRIBUTES2,
        9,
        "no memory for the struct pages of a split",
        "semantics.md 10 [P]",
        _FUTURE,
    ),
    Rule(
        "split.busy",
        ("EAGAIN",),
        _ATTRIBUTES2,
        10,
        "a huge folio that must be split is held",
        "semantics.md 10 [P]",
        _FUTURE,
    ),
    Rule("gmem_convert.off", ("ENOTTY",), _CONVERT, 1, "this ABI level has no huge pages", "uapi.md 14 [P]"),
    Rule(
        "gmem_convert.no_private_memory",
        ("EINVAL",),
        _CONVERT,
        2,
        "the VM's type has no private memory",
        "[I]",
        _FUTURE,
    ),
    Rule("gmem_convert.error_offset", ("EINVAL",), _CONVERT, 3, "error_offset is not zero", "1G RFC v2 [P]", _FUTURE),
    Rule(
        "gmem_convert.range",
        ("EINVAL",),
        _CONVERT,
        4,
        "offset + size wraps or is beyond the file",
        "1G RFC v2 [P]",
        _FUTURE,
    ),
    Rule(
        "gmem_convert.unaligned",
        ("EINVAL",),
        _CONVERT,
        5,
        "offset or size is not page aligned",
        "1G RFC v2 [P]",
        _FUTURE,
    ),
    # fallocate
    Rule("fallocate.range", ("EINVAL",), _FALLOCATE, 1, "offset is negative, or length not positive", "[M] [O F28]"),
    Rule("fallocate.mode", ("EOPNOTSUPP",), _FALLOCATE, 2, "unknown mode, or an illegal combination", "[M] [O F4]"),
    Rule("fallocate.too_big", ("EFBIG",), _FALLOCATE, 3, "offset + length is beyond 2**63 - 1", "[M] [O F45]"),
    Rule("fallocate.gmem_mode", ("EOPNOTSUPP",), _FALLOCATE, 4, "not KEEP_SIZE alone or with PUNCH_HOLE", "[O F1]"),
    Rule("fallocate.unaligned", ("EINVAL",), _FALLOCATE, 5, "offset or length is not page aligned", "[M] [O F20]"),
    Rule("fallocate.past_end", ("EINVAL",), _FALLOCATE, 6, "allocating beyond the end of the file", "[M] [O F38]"),
    Rule("fallocate.interrupted", ("EINTR",), _FALLOCATE, 7, "a signal came; earlier pages stay", "[M]"),
    Rule("pool.no_huge_page", ("ENOMEM",), _FALLOCATE, 8, "a huge page that was reserved went bad", "[I]", _FUTURE),
    Rule(
        "pool.cgroup",
        ("ENOMEM",),
        _FALLOCATE,
        8,
        "the cgroup may not use more huge pages",
        "hugetlb_cgroup.c [M]",
        _FUTURE,
    ),
    Rule("pool.empty", ("ENOMEM",), _FALLOCATE, 8, "the host has no page left", "kvm_gmem_get_folio [M]"),
    Rule("backing.full", ("ENOMEM",), _FALLOCATE, 8, "the host cannot give the memory itself", "[I]"),
    Rule("punch.busy", ("EAGAIN",), _FALLOCATE, 9, "a huge folio in the hole is pinned", "semantics.md 10 [P]"),
    # mmap and what a host process does with memory
    Rule("mmap.offset", ("EINVAL",), _MMAP, 0, "the offset is not page aligned", "arch sys_mmap [M] [O M30]"),
    Rule("mmap.range", ("EINVAL",), _MMAP, 2, "the length is zero", "do_mmap [M] [O M31]"),
    Rule("mmap.exec", ("EPERM",), _MMAP, 3, "guest memory is not executable for the host", "path_noexec [O M8]"),
    Rule("mmap.not_mappable", ("ENODEV",), _MMAP, 4, "the file was made without the MMAP flag", "[M] [O M1]"),
    Rule("mmap.sync", ("EOPNOTSUPP",), _MMAP, 6, "MAP_SYNC is for DAX files", "do_mmap [O M18]"),
    Rule("mmap.private", ("EINVAL",), _MMAP, 5, "only MAP_SHARED", "kvm_gmem_mmap [M] [O M10]"),
    Rule("range.unaligned", ("EINVAL",), "munmap", 1, "address not page aligned, or no size", "mm/mmap.c [M]"),
    Rule("madvise.unmapped", ("ENOMEM",), "madvise", 2, "part of the range is not mapped", "mm/madvise.c [M]"),
    Rule("user.page", ("EFAULT",), "get_user_pages", 1, "a host page cannot be had: private or not mapped", "[O T13]"),
    # Faults
    Rule("fault.past_end", ("EFAULT",), _FAULT, 1, "the page is beyond the end of the file", "[M] [O M26]"),
    Rule("fault.user_private", ("EFAULT",), _FAULT, 2, "this user may never have a private page", "R5 [I]"),
    Rule("fault.access", ("EFAULT",), _FAULT, 3, "the page does not have the access asked for", "R3 [M] [O T1]"),
    Rule("fault.poisoned", ("EHWPOISON",), _FAULT, 4, "the page's memory is bad", "kvm_gmem_get_pfn [M]"),
    Rule("fault.mismatch", ("EFAULT",), "KVM_RUN", 1, "the guest's access is not the page's", "uapi.md 11 [M]"),
    Rule(
        "fault.userfault",
        ("EFAULT",),
        "KVM_RUN",
        3,
        "the frame's bit is set in the slot's bitmap: the VMM is to bring the page",
        "KVM Userfault v3 [P]",
        _FUTURE,
    ),
    Rule("fault.no_slot", ("EFAULT",), "KVM_RUN", 2, "private access where no slot is", "kvm_handle_noslot_fault [M]"),
    Rule("fault.no_gmem", ("EFAULT",), "KVM_RUN", 4, "private access, and the slot has no guest_memfd", "[M]"),
    Rule("fault.file_gone", ("EFAULT",), "KVM_RUN", 5, "the slot's guest_memfd was closed", "[M]"),
    Rule("fault.binding", ("EIO",), "KVM_RUN", 6, "the page is bound to another slot", "__kvm_gmem_get_pfn [M]"),
    Rule("fault.identity", ("EFAULT",), "KVM_RUN", 7, "the memory belongs to another virtual machine", "R24 R26 [I]"),
    # KVM_LINK_GUEST_MEMFD, and where an identity goes
    Rule("link.flags", ("EINVAL",), _LINK, 1, "flags must be zero", "kvm_gmem_link, link RFC v2 04/13 [P]", "future"),
    Rule("link.not_open", ("EINVAL",), _LINK, 2, "the descriptor is not open", "not EBADF [P]", "future"),
    Rule("link.not_gmem", ("EINVAL",), _LINK, 3, "the descriptor is not a guest_memfd", "[P]", "future"),
    Rule("link.same_vm", ("EINVAL",), _LINK, 4, "the file is this VM's own view", "[P]", "future"),
    Rule("link.identity", ("EINVAL",), _LINK, 5, "memory of another virtual machine", "R20 R26 [I]", "future"),
    Rule("link.nomem", ("ENOMEM",), _LINK, 7, "the view cannot be allocated", "[P]", "future"),
    Rule("enc_context.not_vm", ("EBADF",), _MOVE, 1, "the source descriptor is not a VM", "file_is_kvm() [M]"),
    Rule("enc_context.same_vm", ("EINVAL",), _MOVE, 2, "source and destination are one VM", "sev_lock_two_vms [M]"),
    Rule("enc_context.busy", ("EBUSY",), _MOVE, 3, "one of the two is being moved or copied", "sev_lock_two_vms [M]"),
    Rule("enc_context.killed", ("EINTR",), _MOVE, 4, "killed while it waited for a vCPU or a lock", "sev.c [M]"),
    Rule("move.type", ("EINVAL",), _MOVE, 5, "the two VMs are of different types", "sev_vm_move_enc_context_from [M]"),
    Rule("move.source", ("EINVAL",), _MOVE, 6, "the source has no identity, or not any more", "!sev_guest(src) [M]"),
    Rule("move.destination", ("EINVAL",), _MOVE, 7, "the destination uses its own identity", "sev_guest(dst) [M]"),
    Rule("move.mirrors", ("EBUSY",), _MOVE, 8, "the source has helpers", "17d44a96f000 [M]"),
    Rule("move.vcpu_creation", ("EBUSY",), _MOVE, 9, "a vCPU of one of the two is being made", "ecf371f8b02d [M]"),
    Rule("copy.source", ("EINVAL",), _COPY, 5, "the source has no identity of its own", "mirror of a mirror [M]"),
    Rule("copy.destination", ("EINVAL",), _COPY, 6, "the helper uses its own identity or has vCPUs", "sev.c [M]"),
    Rule("enc_context.preserved", ("EBUSY",), _MOVE, 10, "one of the two is preserved for a live update", "[I]"),
    # A live update: what is preserved, frozen, retrieved
    Rule("frozen.fault", ("EPERM",), _FAULT, 5, "the page is not there, and the file is frozen", "kvm_gmem_freeze [P]"),
    Rule("frozen.fallocate", ("EPERM",), _FALLOCATE, 10, "the file is frozen for a live update", "kvm_gmem_freeze [P]"),
    Rule("frozen.convert", ("EPERM",), _ATTRIBUTES2, 12, "the file is frozen for a live update", "[I]"),
    Rule("preserve.twice", ("EBUSY",), _PRESERVE, 3, "it is preserved already", "luo_preserve_file [M]"),
    Rule("preserve.owner", ("EINVAL",), _PRESERVE, 4, "the view is not of the memory's virtual machine", "R27 [I]"),
    Rule("preserve.helper", ("EOPNOTSUPP",), _PRESERVE, 5, "a helper goes with its owner", "[I]"),
    Rule("preserve.huge", ("EOPNOTSUPP",), _PRESERVE, 6, "huge pages are not preserved", "guest_memfd_luo [P]"),
    Rule("preserve.architecture", ("EOPNOTSUPP",), _PRESERVE, 9, "hardware has tables of its pages", "[I]"),
    Rule("preserve.poisoned", ("EHWPOISON",), _PRESERVE, 7, "a page is bad", "guest_memfd_luo [P]"),
    Rule("preserve.vm_first", ("EINVAL",), _PRESERVE, 8, "the file's VM is not in the session", "guest_memfd_luo [P]"),
    Rule("preserve.not_ours", ("ENOENT",), _PRESERVE, 2, "no file that can be preserved", "luo_preserve_file [M]"),
    Rule("preserve.token", ("EEXIST",), _PRESERVE, 1, "the token is taken", "luo_token_is_used [M]"),
    Rule("liveupdate.open", ("EBUSY",), "/dev/liveupdate", 1, "it is open already", "liveupdate.h [M]"),
    Rule("liveupdate.size", ("EINVAL",), "/dev/liveupdate", 2, "the structure says a wrong size", "luo_ioctl [M]"),
    Rule("liveupdate.reserved", ("EOPNOTSUPP",), "/dev/liveupdate", 3, "a reserved word is not zero", "[M]"),
    Rule("liveupdate.name", ("EINVAL",), "/dev/liveupdate", 4, "no name, or one without an end", "luo_session [M]"),
    Rule("liveupdate.exists", ("EEXIST",), "/dev/liveupdate", 5, "a session has this name", "luo_session_create [M]"),
    Rule("liveupdate.no_session", ("ENOENT",), "/dev/liveupdate", 6, "no session of before has this name", "[M]"),
    Rule("liveupdate.retrieved", ("EINVAL",), "/dev/liveupdate", 7, "the session is retrieved already", "[M]"),
    Rule("liveupdate.direction", ("EINVAL",), "/dev/liveupdate", 8, "not for a session of this side of it", "[M]"),
    Rule("retrieve.token", ("ENOENT",), _RETRIEVE, 1, "nothing was preserved under this token", "[M]"),
    Rule("retrieve.twice", ("EBUSY",), _RETRIEVE, 2, "it was retrieved already", "[I]"),
    Rule("retrieve.vm_first", ("EINVAL",), _RETRIEVE, 3, "the file's VM was not retrieved, or is gone", "[P]"),
    Rule("identity.taken", ("EBUSY",), _RETRIEVE, 5, "the identity is somebody else's", "[I]"),
    # What clients of /dev/kvm ask for besides memory
    Rule("dirty_log.none", ("ENOENT",), "KVM_GET_DIRTY_LOG", 1, "no such slot, or it is not logged", "[M] [O R83]"),
    Rule("dirty_log.range", ("EINVAL",), "KVM_CLEAR_DIRTY_LOG", 2, "the frames are not the slot's", "[M]"),
    Rule("enable_cap.argument", ("EINVAL",), "KVM_ENABLE_CAP", 1, "no such capability to enable, or wrong bits", "[M]"),
    Rule("irqchip.exists", ("EEXIST",), "KVM_CREATE_IRQCHIP", 1, "the VM has one already", "kvm_arch_vm_ioctl [M]"),
    Rule("device_attr.unknown", ("ENXIO",), "KVM_GET_DEVICE_ATTR", 1, "/dev/kvm has no such attribute", "x86.c [M]"),
    Rule("irqchip.protected", ("ENOTTY",), "KVM_CREATE_IRQCHIP", 3, "a TD hides its EOIs", "has_protected_eoi [M]"),
    Rule("irqchip.late", ("EINVAL",), "KVM_CREATE_IRQCHIP", 2, "there are vCPUs already", "kvm_arch_vm_ioctl [M]"),
    Rule("irqchip.none", ("ENXIO",), "KVM_GET_IRQCHIP", 1, "the VM has no interrupt controller", "[M]"),
    Rule("vm.has_vcpus", ("EINVAL",), "KVM_SET_IDENTITY_MAP_ADDR", 2, "there are vCPUs already", "x86.c [M]"),
    Rule("tsc.frequency", ("EINVAL",), "KVM_SET_TSC_KHZ", 1, "not the host's, and nothing scales it", "x86.c [M]"),
    Rule("mce.capability", ("EINVAL",), "KVM_X86_SETUP_MCE", 1, "no banks, or more than there are", "x86.c [M]"),
    Rule("mce.bank", ("EINVAL",), "KVM_X86_SET_MCE", 1, "the vCPU has no such bank", "x86.c [M]"),
    Rule("mce.status", ("EINVAL",), "KVM_X86_SET_MCE", 2, "the status is not valid", "x86.c [M]"),
    Rule("msr_filter.flags", ("EINVAL",), _FILTER, 1, "a flag besides DEFAULT_DENY", "x86.c [M] [O]"),
    Rule("msr_filter.denies_all", ("EINVAL",), _FILTER, 2, "no MSR at all would be allowed", "x86.c [M] [O]"),
    Rule("msr_filter.range", ("EINVAL",), _FILTER, 3, "it is for no access, or too long", "kvm_add_msr_filter [M]"),
    Rule("guest_debug.protected", ("EINVAL",), _DEBUG, 1, "the registers are the guest's own", "x86.c [M]"),
    Rule("guest_debug.pending", ("EBUSY",), _DEBUG, 2, "an exception waits already", "x86.c [M] [O]"),
    Rule("device.type", ("ENODEV",), "KVM_CREATE_DEVICE", 1, "x86 has VFIO only", "kvm_ioctl_create_device [M]"),
    Rule("device.exists", ("EBUSY",), "KVM_CREATE_DEVICE", 2, "the VM has its one", "kvm_vfio_create [M]"),
    Rule("device.no_vfio", ("EINVAL",), "KVM_SET_DEVICE_ATTR", 3, "no file of VFIO", "kvm_vfio_file_add [M]"),
    Rule("device.file_exists", ("EEXIST",), "KVM_SET_DEVICE_ATTR", 4, "added already", "kvm_vfio_file_add [M]"),
    Rule("device.no_file", ("ENOENT",), "KVM_SET_DEVICE_ATTR", 5, "it was not added", "kvm_vfio_file_del [M]"),
    Rule("run.sync_regs", ("EINVAL",), "KVM_RUN", 13, "a set of registers that there is not", "x86.c [M] [O]"),
    Rule("vcpu.too_many", ("EINVAL",), "KVM_CREATE_VCPU", 4, "1024 are there", "kvm_vm_ioctl_create_vcpu [M]"),
    Rule("irqchip.pins", ("EINVAL",), "KVM_CAP_SPLIT_IRQCHIP", 1, "more pins than there can be routes", "x86.c [M]"),
    Rule("irqchip.split_late", ("EEXIST",), "KVM_CAP_SPLIT_IRQCHIP", 3, "there are vCPUs already", "x86.c [M] [O]"),
    Rule("x2apic_api.eoi", ("EINVAL",), "KVM_CAP_X2APIC_API", 2, "no IOAPIC of the VMM's, or both flags", "[O]"),
    Rule("boot_cpu.late", ("EBUSY",), "KVM_SET_BOOT_CPU_ID", 1, "there are vCPUs already", "x86.c [M]"),
    Rule("pit.no_pic", ("ENOENT",), "KVM_CREATE_PIT2", 2, "there is no 8259A for it to tick at", "x86.c [M]"),
    Rule("pit.none", ("ENXIO",), "KVM_GET_PIT2", 1, "the VM has no PIT", "kvm_arch_vm_ioctl [M]"),
    Rule("routing.no_irqchip", ("EINVAL",), _ROUTING, 1, "there is no controller to route to", "kvm_main.c [M]"),
    Rule("routing.table", ("EINVAL",), _ROUTING, 2, "flags, or more entries than 4096", "kvm_main.c [M]"),
    Rule("routing.gsi", ("EINVAL",), _ROUTING, 3, "GSIs end at 4095", "kvm_set_irq_routing [M]"),
    Rule("routing.flags", ("EINVAL",), _ROUTING, 4, "a flag that such a route has not", "kvm_set_irq_routing [M]"),
    Rule("routing.type", ("EINVAL",), _ROUTING, 5, "no such kind of route here", "kvm_set_routing_entry [M]"),
    Rule("routing.pin", ("EINVAL",), _ROUTING, 6, "the controller has no such pin", "kvm_set_routing_entry [M]"),
    Rule("routing.duplicate", ("EINVAL",), _ROUTING, 8, "a GSI twice to one controller", "setup_routing_entry [M]"),
    Rule("msi.no_irqchip", ("EINVAL",), "KVM_SIGNAL_MSI", 1, "no APIC to take it", "kvm_send_userspace_msi [M]"),
    Rule("msi.flags", ("EINVAL",), "KVM_SIGNAL_MSI", 2, "flags but VALID_DEVID", "kvm_send_userspace_msi [M]"),
    Rule("msi.address", ("EINVAL",), "KVM_SIGNAL_MSI", 3, "reserved bits of a 32-bit ID", "kvm_msi_route_invalid [M]"),
    Rule("msi.nobody", ("EPERM",), "KVM_SIGNAL_MSI", 4, "there is no APIC yet", "kvm_irq_delivery_to_apic's -1 [O]"),
    Rule("irqfd.flags", ("EINVAL",), "KVM_IRQFD", 1, "unknown flags", "kvm_irqfd [M]"),
    Rule("irqfd.no_irqchip", ("EINVAL",), "KVM_IRQFD", 2, "no controller that can do it", "kvm_arch_irqfd_allowed [M]"),
    Rule("irqfd.no_eventfd", ("EINVAL",), "KVM_IRQFD", 4, "the descriptor is no eventfd", "eventfd_ctx_fileget [M]"),
    Rule("irqfd.exists", ("EBUSY",), "KVM_IRQFD", 5, "the eventfd raises a GSI already", "kvm_irqfd_assign [M]"),
    Rule("interrupt.pending", ("EEXIST",), "KVM_INTERRUPT", 3, "the last one has not been taken", "x86.c [M]"),
    Rule("kvmclock.off", ("EINVAL",), "KVM_KVMCLOCK_CTRL", 1, "the guest has no kvmclock", "kvm_set_guest_paused [M]"),
    Rule("sregs.apic_base", ("EINVAL",), "KVM_SET_SREGS", 2, "an APIC base that cannot be", "kvm_apic_set_base [M]"),
    Rule("lapic.id", ("EINVAL",), "KVM_SET_LAPIC", 2, "an x2APIC's ID is fixed", "kvm_apic_state_fixup [M]"),
    Rule("lapic.none", ("EINVAL",), "KVM_GET_LAPIC", 1, "the VM has no interrupt controller", "[M]"),
    Rule("ioeventfd.argument", ("EINVAL",), "KVM_IOEVENTFD", 1, "length, flags or range are wrong", "eventfd.c [M]"),
    Rule("ioeventfd.exists", ("EEXIST",), "KVM_IOEVENTFD", 3, "the same is assigned already", "eventfd.c [M]"),
    Rule("ioeventfd.none", ("ENOENT",), "KVM_IOEVENTFD", 4, "none such is assigned", "eventfd.c [M]"),
    Rule("coalesced.zone", ("EINVAL",), "KVM_REGISTER_COALESCED_MMIO", 1, "pio is neither 0 nor 1", "[M]"),
    Rule("interrupt.vector", ("EINVAL",), "KVM_INTERRUPT", 1, "vectors end at 255", "x86.c [M]"),
    Rule("interrupt.irqchip", ("ENXIO",), "KVM_INTERRUPT", 2, "the controller is in the kernel", "x86.c [M]"),
    Rule("vcpu.mp_state", ("EINVAL",), "KVM_SET_MP_STATE", 1, "no such state without an irqchip", "x86.c [M]"),
    Rule("sregs.invalid", ("EINVAL",), "KVM_SET_SREGS", 1, "paging, long mode and CS do not agree", "[M]"),
    Rule("fpu.invalid", ("EINVAL",), "KVM_SET_FPU", 1, "reserved bits of MXCSR or of the XSAVE header", "[M]"),
    Rule("xcrs.invalid", ("EINVAL",), "KVM_SET_XCRS", 1, "XCR0 without x87, or with what there is not", "[M]"),
    Rule("debugregs.invalid", ("EINVAL",), "KVM_SET_DEBUGREGS", 1, "flags, or upper halves of DR6, DR7", "[M]"),
    Rule("events.invalid", ("EINVAL",), "KVM_SET_VCPU_EVENTS", 1, "no exception has this vector", "[M]"),
    Rule(
        "gup_test.argument", ("EINVAL",), "gup_test", 1, "pins are there already, or not aligned", "mm/gup_test.c [F]"
    ),
    # /dev/iommu and VFIO: order as drivers/iommu/iommufd has it; what is only in guest_memfd's design is ours
    Rule(
        "iommufd.size", ("EINVAL",), _IOMMU, 1, "the structure is shorter than the call's first version", "main.c [M]"
    ),
    Rule("iommufd.too_big", ("E2BIG",), _IOMMU, 2, "what the structure has beyond the known is not zero", "main.c [M]"),
    Rule("iommufd.unsupported", ("EOPNOTSUPP",), _IOMMU, 3, "a flag or reserved word that is not known", "ioas.c [M]"),
    Rule("iommu.overflow", ("EOVERFLOW",), _IOMMU, 4, "IOVA or length is too large, or they wrap", "ioas.c [M]"),
    Rule("iommufd.argument", ("EINVAL",), _IOMMU, 5, "no such value, or neither readable nor writable", "ioas.c [M]"),
    Rule("iommufd.no_object", ("ENOENT",), _IOMMU, 6, "no object of this kind has this number", "iommufd_get_object"),
    Rule("iommufd.in_use", ("EBUSY",), "IOMMU_DESTROY", 7, "another object uses it", "iommufd_object_remove [M]"),
    Rule("iommufd.not_a_pt", ("EINVAL",), _VFIO, 7, "neither address space nor page table", "iommufd_device_change_pt"),
    Rule("iommufd.ranges", ("EMSGSIZE",), "IOMMU_IOAS_IOVA_RANGES", 7, "more ranges than there is room", "ioas.c [M]"),
    Rule("iommu.not_file", ("EINVAL",), "IOMMU_IOAS_MAP_FILE", 8, "neither memfd nor guest_memfd", "memfd_pin_folios"),
    Rule("iommu.past_end", ("EINVAL",), _IOMMU_MAP, 9, "the range is not inside the file", "uapi.md 16 [I]"),
    Rule("iommu.unaligned", ("EINVAL",), _IOMMU_MAP, 10, "not page aligned, or no length", "iopt_alloc_area_pages [M]"),
    Rule("iommu.no_room", ("ENOSPC",), _IOMMU_MAP, 11, "no free range of IOVA is long enough", "iopt_alloc_iova [M]"),
    Rule("iommu.iova", ("EINVAL",), _IOMMU_MAP, 12, "the hardware reserves some of this range", "iopt_check_iova [M]"),
    Rule("iommu.exists", ("EEXIST",), _IOMMU_MAP, 13, "something is mapped in this range", "iopt_check_iova [M]"),
    Rule("iommu.reserved", ("EADDRINUSE",), _IOMMU, 13, "the hardware reserves what is used or allowed", "[M]"),
    Rule("iommu.read_only", ("EPERM",), "IOMMU_IOAS_COPY", 14, "pinned for reading only", "iopt_insert_area [M]"),
    Rule("iommu.nomem", ("ENOMEM",), "IOMMU_HWPT_ALLOC", 14, "the page table cannot be allocated", "[M]"),
    Rule("iommu.access", ("EFAULT",), _IOMMU_MAP, 15, "a page of the range is not of a domain's access", "R3 [I]"),
    Rule("iommu.revoked", ("EIO",), _DMA, 2, "the area was revoked: its memory ended or could not be cut", "Q7 [I]"),
    Rule("iommu.part", ("ENOENT",), "IOMMU_IOAS_UNMAP", 8, "part of a pinned mapping", "iopt_unmap_iova_range [M]"),
    Rule("iommu.not_mapped", ("ENOENT",), "IOMMU_IOAS_UNMAP", 9, "nothing is mapped there", "iopt_unmap_iova_range"),
    Rule("vfio.argument", ("EINVAL",), _VFIO, 1, "argsz is too small, or a flag", "vfio/device_cdev.c [M]"),
    Rule("vfio.bound", ("EINVAL",), _VFIO, 2, "the device is bound already", "vfio_df_ioctl_bind_iommufd [M]"),
    Rule("vfio.not_iommufd", ("EBADFD",), _VFIO, 3, "the descriptor is no /dev/iommu", "iommufd_ctx_from_fd [M]"),
    Rule(
        "vfio.not_bound", ("EINVAL",), _VFIO, 0, "the device is bound to no iommufd", "vfio_device_fops_unl_ioctl [M]"
    ),
    Rule("vfio.dead", ("EIO",), _VFIO, 4, "the device's process has ended", "[I]"),
    Rule("dma.not_attached", ("EFAULT",), _DMA, 1, "the device is attached to no domain", "iommu_group blocking [M]"),
    Rule("dma.unmapped", ("EFAULT",), _DMA, 3, "nothing is mapped there, or the device cannot ask for it", "[M]"),
    Rule("dma.permission", ("EFAULT",), _DMA, 4, "mapped, but not for reading, or not for writing", "[M]"),
    Rule("iommu.not_guests", ("EFAULT",), _DMA, 5, "its guest has not touched it, or in another size", "Q13"),
    Rule("dma.rmp", ("EFAULT",), _DMA, 6, "SNP: the RMP has the page as another's, or in another size", "Q13 [P]"),
    Rule("dma.sept", ("EFAULT",), _DMA, 7, "TDX: the Secure EPT does not map the page", "TDX Connect [P]"),
    Rule("dma.machine_check", ("EHWPOISON",), _DMA, 8, "TDX: it has poisoned a TD's page; a machine is reset", "Q9"),
    Rule("dma.gpt", ("EFAULT",), _DMA, 9, "CCA: granule protection fault", "semantics.md 11 [2]"),
    Rule("dma.hypervisor", ("EFAULT",), _DMA, 10, "pKVM: the hypervisor's table has not the page", "[F]"),
    # Architectures
    Rule(
        "arch.make_private", ("EINVAL",), "KVM_RUN", 8, "hardware or firmware did not take the page", "sev_gmem_prepare"
    ),
    Rule(
        "arch.guest_access", ("EFAULT",), "KVM_RUN", 9, "the page is not the guest's at this address", "APM 2, 15.36.10"
    ),
    Rule("run.no_vcpu", ("EINVAL",), "KVM_RUN", 11, "firmware has no such vCPU", "tdx_vcpu_pre_run [M]"),
    Rule("run.not_launched", ("EINVAL",), "KVM_RUN", 10, "the guest's launch is not finished", "pre_sev_run [M]"),
    Rule("snp_op.mirror", ("EINVAL",), _SNP_OP, 1, "the owner's, not for a helper", "is_cmd_allowed_from_mirror [M]"),
    Rule("snp_op.not_snp", ("EPERM",), _SNP_OP, 2, "after KVM_SEV_INIT2 only commands of SNP", "sev_mem_enc_ioctl [M]"),
    Rule("snp_op.command", ("EINVAL",), _SNP_OP, 3, "no such command", "sev_mem_enc_ioctl [M]"),
    Rule("snp_op.not_init", ("ENOTTY", "EINVAL"), _SNP_OP, 4, "KVM_SEV_INIT2 comes first", "sev_guest(), sev.c [M]"),
    Rule("snp_op.vcpus", ("EINVAL",), _SNP_OP, 5, "there are vCPUs already", "__sev_guest_init, snp_enable_certs [M]"),
    Rule("snp_op.context", ("EINVAL",), _SNP_OP, 6, "the launch has begun already", "snp_launch_start [M]"),
    Rule("snp_op.no_context", ("EINVAL",), _SNP_OP, 7, "SNP_LAUNCH_START comes first", "snp_launch_update [M]"),
    Rule("snp_op.argument", ("EINVAL",), _SNP_OP, 8, "a field has no such value", "__sev_guest_init, snp_launch_* [M]"),
    Rule(
        "snp_op.policy", ("EINVAL",), _SNP_OP, 9, "bits that KVM does not have, or not bit 17", "snp_launch_start [M]"
    ),
    Rule(
        "snp_op.populate", ("EIO",), _SNP_OP, 10, "a page was not added, by the rule `cause`", "snp_launch_update [M]"
    ),
    Rule("tdx_op.hw_error", ("EINVAL",), _TDX_OP, 1, "hw_error is not zero", "tdx_vm_ioctl [M]"),
    Rule("tdx_op.command", ("EINVAL",), _TDX_OP, 2, "no such command for this VM or vCPU", "tdx_vm_ioctl [M]"),
    Rule("tdx_op.order", ("EINVAL",), _TDX_OP, 3, "too early or too late in the life of TD or vCPU", "tdx_td_init [M]"),
    Rule("tdx_op.argument", ("EINVAL",), _TDX_OP, 4, "a field has no such value", "tdx_vcpu_init_mem_region [M]"),
    Rule("tdx_op.vcpus", ("EBUSY",), _TDX_OP, 5, "KVM_TDX_INIT_VM comes before any vCPU", "setup_tdparams [M]"),
    Rule("tdx_op.attributes", ("EINVAL",), _TDX_OP, 6, "an attribute that KVM or module has not", "setup_tdparams [M]"),
    Rule("tdx_op.xfam", ("EINVAL",), _TDX_OP, 7, "a state component that this machine has not", "setup_tdparams [M]"),
    Rule("tdx_op.cpuid", ("EINVAL",), _TDX_OP, 8, "no TD can have these CPUID values", "setup_tdparams_cpuids [M]"),
    Rule("tdx_op.init_vcpu", ("EIO",), _TDX_OP, 9, "the module refused a vCPU", "tdx_td_vcpu_init [M]"),
    Rule("launch.done", ("EINVAL",), "launch", 1, "the guest is launched already, or needs no launch", "sev.c [M]"),
    Rule("launch.start", ("EIO", "ENOTTY", "EINVAL"), "launch", 2, "firmware refused to begin", "snp_launch_start [M]"),
    Rule("launch.update", ("EIO", "EBUSY"), "launch", 3, "firmware refused a page", "sev_gmem_post_populate [M]"),
    Rule("launch.vcpu_creation", ("EBUSY",), "launch", 4, "a vCPU is being made", "af44c79b31e4 [M]"),
    Rule("launch.killed", ("EINTR",), "launch", 5, "killed while it waited for the vCPUs", "kvm_lock_all_vcpus [M]"),
    Rule("launch.finish", ("EIO", "EBUSY"), "launch", 6, "firmware refused to end it", "snp_launch_finish [M]"),
    # KVM_PRE_FAULT_MEMORY, populate, vCPUs, identities
    Rule("prefault.flags", ("EINVAL",), _PREFAULT, 2, "flags must be zero", "uapi.md 12 [M] [O G40]"),
    Rule("prefault.unaligned", ("EINVAL",), _PREFAULT, 3, "gpa or size is not page aligned", "[M] [O G42]"),
    Rule("prefault.range", ("EINVAL",), _PREFAULT, 4, "size is zero, or gpa + size wraps", "[M] [O G41]"),
    Rule("prefault.interrupted", ("EINTR",), _PREFAULT, 5, "a signal came before the first page", "[M]"),
    Rule("prefault.no_slot", ("ENOENT",), _PREFAULT, 6, "no memory at this address", "kvm_tdp_map_page [M]"),
    Rule("prefault.slot_deleted", ("EAGAIN",), _PREFAULT, 6, "the slot is being deleted", "3ccbf6f47098 [M]"),
    Rule("populate.range", ("EINVAL",), "populate", 1, "no pages, or an unaligned source", "kvm_gmem_populate [M]"),
    Rule("populate.not_gmem", ("EINVAL",), "populate", 2, "the frame is in no guest_memfd slot", "[M]"),
    Rule("populate.interrupted", ("EINTR",), "populate", 3, "a signal came before the first page", "[M]"),
    Rule("populate.shared", ("EINVAL",), "populate", 4, "only private pages are populated", "e4ee54479273 [M]"),
    Rule("run.uninitialized", ("EAGAIN",), "KVM_RUN", 12, "INIT came: run again, for SIPI", "x86.c [M]"),
    Rule("run.interrupted", ("EINTR",), "KVM_RUN", 0, "immediate_exit is set, or a signal is pending", "[M]"),
    Rule("vcpu.number", ("EINVAL",), "KVM_CREATE_VCPU", 0, "the number is too large", "kvm_vm_ioctl_create_vcpu [M]"),
    Rule("vcpu.td_state", ("EIO",), "KVM_CREATE_VCPU", 2, "not between TDX_INIT_VM and FINALIZE_VM", "tdx_vcpu_create"),
    Rule("vcpu.no_apic", ("EINVAL",), "KVM_CREATE_VCPU", 3, "a TD needs an APIC in the kernel", "tdx_vcpu_create [M]"),
    Rule("vcpu.exists", ("EEXIST",), "KVM_CREATE_VCPU", 1, "the VM has a vCPU of this number", "[M]"),
    Rule("create_vm.type", ("EINVAL",), "KVM_CREATE_VM", 0, "no such type of VM", "kvm_is_vm_type_supported [O C14]"),
    Rule("identity.exhausted", ("EBUSY",), "KVM_CREATE_VM", 1, "every ASID or HKID is in use", "sev_asid_new [M]"),
    # guestmem simulate
    Rule("trace.line", ("EINVAL",), "simulate", 1, "the line is not one event as JSON", "trace/events.py [I]"),
    Rule("trace.file", ("EINVAL",), "simulate", 2, "the guest_memfd is not there, or was created before", "[I]"),
    Rule("trace.range", ("EINVAL",), "simulate", 3, "no pages of the file, or no size of one", "trace_file.py [I]"),
    Rule("trace.access", ("EINVAL",), "simulate", 4, "neither shared nor private", "trace_file.py [I]"),
    Rule("trace.nothing", ("EINVAL",), "simulate", 5, "no guest_memfd is created in the trace", "trace_file.py [I]"),
    Rule("generate.memory", ("EINVAL",), "simulate", 6, "1 GiB to 64 TiB in steps of 2 MiB", "generators [I]"),
    Rule("costs.file", ("EINVAL",), "simulate", 7, "not a cost model as --show-costs prints it", "costs.py [I]"),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}
assert len(RULES) == len(_TABLE), "a rule is listed twice"
