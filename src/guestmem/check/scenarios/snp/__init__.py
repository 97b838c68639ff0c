"""SNP guests: launch, RMP, VMSAs, failing firmware."""
