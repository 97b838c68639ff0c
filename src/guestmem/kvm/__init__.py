"""User 2 of the provider: KVM. Virtual machines, memslots, stage 2, vCPUs, and the adapter to guest_memfd.

A guest touches a page: `mmu.py`. A file meets a VM: `context.py`. A memslot comes and goes: `set_region.py`.
"""
