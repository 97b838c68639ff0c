"""guestmem: guest_memfd as its long-term design has it, running in user space."""
