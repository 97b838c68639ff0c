"""KVM for guests that hardware or firmware protects: their launch, how their vCPUs go in and out, what they ask for.

    launch         launch.py, and what clients call: snp_op.py, tdx_op.py
    guest mode     guest_mode.py; state_page.py where the guest made the page that a vCPU's state is in
    calls          ghcb.py and tdcall.py; guest_instructions.py for those that are no exits

How pages change hands is `kvm/protection.py`'s.
"""
