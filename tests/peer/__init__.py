"""Programs that nobody here wrote: the kernel's own KVM tests, and our clients that cover the same cases."""
