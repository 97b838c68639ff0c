"""Several struct kvm of one virtual machine: links, helpers, migration."""
