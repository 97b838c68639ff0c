"""What must always hold, as code: the properties of spec/invariants.md, executable after any scheduler step."""
